"""Measures commands of the client, as whole processes from fork to exit; see `python -m bench`."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from typing import TYPE_CHECKING

from bench.harness import CERTS, HERE, Service, in_turn, ms, print_heading, report_ratio, times

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["bench_command_line"]

_RUNS = 3  # of each command in a round

# The floor of `client status`: the shortest script that prints the status of a job.
_BARE_CALL = """
import os
import sys
import grpc
import workerservice_pb2
import workerservice_pb2_grpc

address, job_id, *paths = sys.argv[1:]
token = os.environ["JOBWORKER_TOKEN"]
credentials = grpc.ssl_channel_credentials(*(open(path, "rb").read() for path in paths))
with grpc.secure_channel(address, credentials) as channel:
    stub = workerservice_pb2_grpc.WorkerServiceStub(channel)
    request = workerservice_pb2.GetJobStatusRequest(job_id=job_id)
    print(stub.GetJobStatus(request, metadata=(("authorization", f"Bearer {token}"),)).job)
"""


def bench_command_line(service: Service) -> None:
    """Measure `client --help` and `client status`.

    The floors: a Python that does nothing, and a script that makes the same call.
    """
    job_id = service.client.start("true")
    launcher = str(HERE / "client")
    options = ("--server", service.address, "--certs", str(CERTS))
    files = [str(CERTS / name) for name in ("server-ca.pem", "client-key.pem", "client.pem")]
    programs: dict[str, Sequence[str]] = {
        "help": (launcher, "--help"),
        "pass": (sys.executable, "-c", "pass"),
        "status": (launcher, "status", *options, "-j", job_id),
        "script": (sys.executable, "-c", _BARE_CALL, service.address, job_id, *files),
    }
    environment = os.environ | {"JOBWORKER_TOKEN": service.client.token}

    def runs(command: Sequence[str]) -> Callable[[], float]:
        def run() -> None:
            subprocess.run(
                command,
                cwd=HERE,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                check=True,
            )

        return lambda: statistics.median(times(run, _RUNS))

    found = in_turn({name: runs(command) for name, command in programs.items()})
    print_heading("The command line: time / floor")
    for what, ours, theirs, aim in (
        ("client --help / python -c pass", "help", "pass", "<= 1.5"),
        ("client status / a bare script that calls", "status", "script", ""),
    ):
        detail = f"{ms(found[ours], 1)} / {ms(found[theirs], 1)}"
        report_ratio(what, found[ours], found[theirs], detail, aim)
