"""A proxy between clients and a server, whose connections a test can cut."""

from __future__ import annotations

import contextlib
import socket
import threading

from testkit import GUARD_S


class Proxy:
    """Passes bytes on between clients and a server. `cut` breaks off all connections.

    `source`: the address from which it connects to the server.
    """

    def __init__(self, target: str, port: int = 0, *, source: str = "127.0.0.1") -> None:
        host, _, target_port = target.rpartition(":")
        self._target = host, int(target_port)
        self._source = source, 0
        self._listener = socket.create_server(("127.0.0.1", port))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        # Guards the two below. Notified when bytes were passed on.
        self._changed = threading.Condition()
        self._sockets: list[socket.socket] = []
        self._passed = 0  # bytes, from clients
        self._threads = [threading.Thread(target=self._accept, name="proxy")]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target, source_address=self._source)
                with self._changed:
                    self._sockets += [client, server]
                for each in ((client, server, 1), (server, client, 0)):
                    self._threads.append(
                        threading.Thread(target=self._pass, args=each, name="proxy")
                    )
                    self._threads[-1].start()

    def _pass(self, source: socket.socket, target: socket.socket, weight: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
                with self._changed:
                    self._passed += weight * len(data)
                    self._changed.notify_all()
        _shut_down(source)
        _shut_down(target)

    def cut(self) -> None:
        """Break off all connections; new ones are possible."""
        with self._changed:
            sockets = list(self._sockets)
        for each in sockets:
            _shut_down(each)

    def await_passed(self, more: int) -> None:
        """Block until clients have sent that many more bytes."""
        with self._changed:
            goal = self._passed + more
            assert self._changed.wait_for(lambda: self._passed >= goal, GUARD_S)

    def close(self) -> None:
        _shut_down(self._listener)
        self._threads[0].join()
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()
        for each in self._sockets:
            each.close()


def _shut_down(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
