"""The services that gRPC defines for every server: health and reflection.

    services = StandardServices(health="auto", reflection="off")
    services.add_to(server)
    ...
    services.leave()        # the server is about to end

Both come from gRPC's own packages, which are optional: `make extras` installs them. With "auto" a
service is there if its package is; with "on" a missing package is an error.

A caller needs a client certificate and no token: a load balancer has no password, and the protos
that reflection shows are public. Like every call, these pass the gate. A `Check` that succeeds is
the only call without a line in the audit log.

Thread safety: any thread may call anything. A call runs in the thread that `calls.py` gives it.

Sources: https://grpc.io/docs/guides/health-checking/, https://grpc.io/docs/guides/reflection/.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import authservice_pb2 as auth_pb
import workerservice_pb2 as worker_pb
from gate import SHOWN_CHARACTERS, UnknownServiceError
from settings import SettingsError

# Imported at once and not when they are needed: by then this process may be a user that cannot
# read the files of the packages.
try:
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc
except ImportError:
    health = None
try:
    from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
except ImportError:
    reflection = None

if TYPE_CHECKING:
    from collections.abc import Iterator

    import grpc

    from gate import Call

__all__ = ["StandardServices"]

_OURS = tuple(
    service.full_name
    for file in (auth_pb.DESCRIPTOR, worker_pb.DESCRIPTOR)
    for service in file.services_by_name.values()
)
_REMEDY = "run `make extras`, or `pip install {}` in the server's environment"


class StandardServices:
    """Health and reflection; each "auto", "on" or "off".

    Raises `SettingsError` if one is on and its package is missing.
    """

    def __init__(self, *, health: str, reflection: str) -> None:
        self._health = _Health() if _is_wanted("health", health) else None
        self._has_reflection = _is_wanted("reflection", reflection)

    def add_to(self, server: grpc.Server) -> None:
        """Add the services to a server that has not been started."""
        names = list(_OURS)
        if self._health is not None:
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
            names.append(health.SERVICE_NAME)
        if self._has_reflection:
            names.append(reflection.SERVICE_NAME)
            servicer = _Reflection(names)
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)

    def leave(self) -> None:
        """Say NOT_SERVING from now on, and end the calls that watch; idempotent."""
        if self._health is not None:
            self._health.leave()


def _is_wanted(name: str, wish: str) -> bool:
    package, found = {
        "health": ("grpcio-health-checking", health is not None),
        "reflection": ("grpcio-reflection", reflection is not None),
    }[name]
    if wish == "on" and not found:
        raise SettingsError(
            f"--{name} on: the package {package} is missing; {_REMEDY.format(package)}"
        )
    return found and wish != "off"


class _Health:
    """gRPC's servicer, which keeps the status, behind the interface of the gate."""

    def __init__(self) -> None:
        self._servicer = health.HealthServicer()
        for name in _OURS:
            self._servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        # Guards the two below. Never held while another lock is taken.
        self._lock = threading.Lock()
        self._watchers: set[Any] = set()
        self._has_left = False

    def Check(self, request: Any, call: Call) -> Any:  # noqa: N802
        _check_name(request.service)
        # A load balancer asks every few seconds. The answer tells and changes nothing, so an answer
        # has no line in the audit log; a refusal has one.
        call.recorded = True
        return self._servicer.Check(request, call.context)

    def List(self, _: Any, call: Call) -> Any:  # noqa: N802
        every = {
            name: self._servicer.Check(health_pb2.HealthCheckRequest(service=name), call.context)
            for name in ("", *_OURS)
        }
        return health_pb2.HealthListResponse(statuses=every)

    def Watch(self, request: Any, call: Call) -> Iterator[bytes]:  # noqa: N802
        """Return a generator of serialized messages, which lasts until the client or we end it."""
        _check_name(request.service)  # the servicer would keep any name for ever
        watcher = self._servicer.Watch(request, call.context)
        call.record()
        return self._messages(watcher)

    def _messages(self, watcher: Any) -> Iterator[bytes]:
        with self._lock:
            self._watchers.add(watcher)
            has_left = self._has_left
        try:
            if has_left:
                watcher.close()
            for response in watcher:
                yield response.SerializeToString()
        finally:
            with self._lock:
                self._watchers.discard(watcher)

    def leave(self) -> None:
        self._servicer.enter_graceful_shutdown()
        with self._lock:
            self._has_left = True
            watchers = tuple(self._watchers)
        for watcher in watchers:
            watcher.close()  # after the last status has been sent


def _check_name(service: str) -> None:
    if service and service not in _OURS:
        raise UnknownServiceError(service[:SHOWN_CHARACTERS])


class _Reflection:
    """gRPC's servicer behind the interface of the gate."""

    def __init__(self, names: list[str]) -> None:
        self._servicer = reflection.ReflectionServicer(names)

    def ServerReflectionInfo(self, requests: Iterator[Any], call: Call) -> Iterator[bytes]:  # noqa: N802
        call.record()
        return (
            response.SerializeToString()
            for response in self._servicer.ServerReflectionInfo(requests, call.context)
        )
