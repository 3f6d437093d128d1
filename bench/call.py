"""Measures the time of a call and, as its floor, of a bare gRPC call; see `python -m bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.harness import Service, ms, percentile, print_heading, report_ratio, sampled, times

if TYPE_CHECKING:
    from bench.floor import Floor

__all__ = ["bench_call"]

_CALLS = 20  # in a turn; a round has ten turns


def bench_call(service: Service, floor: Floor) -> None:
    """Measure GetJobStatus of a running job and of a finished one. The floor: a bare unary call."""
    client = service.client
    finished, running = client.start("/bin/true"), client.start("sleep", ["1000"])
    for _ in client.stream(finished):
        pass
    found = sampled(
        {
            "floor": lambda: times(floor.unary, _CALLS),
            "finished": lambda: times(lambda: client.status(finished), _CALLS),
            "running": lambda: times(lambda: client.status(running), _CALLS),
        }
    )
    client.stop(running)
    print_heading("A call over mTLS: time / bare unary call")
    p50 = {name: [percentile(each, 50) for each in rounds] for name, rounds in found.items()}
    for name in ("finished", "running"):
        report_ratio(
            f"Status of a {name} job, p50",
            *(p50[name], p50["floor"]),
            f"{ms(p50[name])} / {ms(p50['floor'])}",
            "<= 1.6",
        )
