"""Tests of what the benchmark makes of its measurements."""

from __future__ import annotations

import contextlib
import os

import pytest

from bench import harness, soak
from bench.floor import ByHand
from bench.harness import NOISE_MAX, Ratio, in_turn, percentile, report_ratio, sampled


@pytest.mark.parametrize(
    ("percent", "value"), [(0, 1), (1, 1), (50, 50), (50.5, 51), (99, 99), (99.1, 100), (100, 100)]
)
def test_percentile_is_the_smallest_value_that_so_many_do_not_exceed(
    percent: float, value: float
) -> None:
    """Whatever the order of the values."""
    assert percentile([*range(51, 101), *range(1, 51)], percent) == value


@pytest.mark.parametrize("percent", [0, 50, 99, 100])
def test_percentile_of_one_value_is_that_value(percent: float) -> None:
    """Of none there is no percentile."""
    assert percentile([7.0], percent) == 7.0
    with pytest.raises(ValueError, match="no values"):
        percentile([], percent)


def test_ratio_is_the_median_of_the_rounds_ratios() -> None:
    """Not the ratio of the medians, and not the best."""
    ratio = Ratio.of([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    assert (ratio.median, ratio.lowest, ratio.highest) == (2.0, 1.0, 3.0)


def test_noise_is_the_distance_of_the_quartiles_over_the_median() -> None:
    """One odd round does not make it noisy."""
    assert Ratio.of([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5).noise == pytest.approx(2 / 3)
    assert Ratio.of([1.0, 1.0, 1.0, 1.0, 50.0], [1.0] * 5).noise == 0


@pytest.mark.parametrize("rounds", [0, 1])
def test_ratio_needs_rounds(rounds: int) -> None:
    """One alone would look like one without noise."""
    with pytest.raises(ValueError, match="rounds"):
        Ratio.of([1.0] * rounds, [1.0] * rounds)


def test_rounds_of_both_sides_must_pair(capsys: pytest.CaptureFixture[str]) -> None:
    """A ratio is of what was measured in the same round."""
    with pytest.raises(ValueError, match="shorter"):
        report_ratio("x", [1.0, 2.0, 3.0], [1.0, 2.0])
    assert capsys.readouterr().out == ""


def test_ratio_that_noise_swallows_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """But from where to where it went; just below the bound it is printed."""
    report_ratio("x", [1.0, 2.0, 3.0], [1.0] * 3, aim="<= 2")
    (noisy,) = capsys.readouterr().out.splitlines()
    assert "2.00 x" not in noisy
    assert "too noisy  1.00 to 3.00, 50 %" in noisy
    assert noisy.endswith("aim <= 2")
    # The quartiles are halfway between the middle and the ends.
    edge = NOISE_MAX * 0.999
    report_ratio("x", [1 - edge, 1.0, 1 + edge], [1.0] * 3)
    assert "1.00 x" in capsys.readouterr().out
    edge = NOISE_MAX * 1.001
    report_ratio("x", [1 - edge, 1.0, 1 + edge], [1.0] * 3)
    assert "1.00 x" not in capsys.readouterr().out


def test_measures_take_turns_and_the_first_round_is_not_counted() -> None:
    """Every other round goes backwards."""
    order: list[str] = []

    def measure(name: str) -> int:
        order.append(name)
        return len(order)

    found = in_turn({name: lambda name=name: measure(name) for name in "abc"}, 2)  # type: ignore[misc]
    assert "".join(order) == "abccbaabc"
    assert found == {"a": [6, 7], "b": [5, 8], "c": [4, 9]}


def test_samples_of_a_round_are_those_of_its_turns() -> None:
    """All of them, but those of the round that warms up."""
    calls = iter(range(1000))
    found = sampled({"a": lambda: [float(next(calls))] * 2}, rounds=2, turns=3)
    # Call 0 warms up, and 1 to 3 are the first round, which does too.
    assert found == {"a": [[4, 4, 5, 5, 6, 6], [7, 7, 8, 8, 9, 9]]}


def test_soak_sees_what_is_more_than_chance() -> None:
    """Of what must be the same not even one more; of less there is no complaint."""
    first = soak.Load(*[100.0] * 8)
    assert first.excess_over(first) == {}
    assert soak.Load(*[50.0] * 8).excess_over(first) == {}
    more = soak.Load(
        descriptors=120,
        fork_server_descriptors=103,
        threads=121,
        memory=110,
        fork_server_memory=100,
        cgroups=101,
        files=101,
        processes=100,
    )
    assert more.excess_over(first) == {
        "fork_server_descriptors": 3,
        "threads": 21,
        "cgroups": 1,
        "files": 1,
    }


def test_memory_and_cpu_time_of_a_process_are_read() -> None:
    """Its peak is no less than what it has now."""
    pid = os.getpid()
    now = harness.memory_bytes(pid)
    assert harness.MIB < now <= harness.memory_bytes(pid, "VmHWM")
    assert harness.cpu_s(pid) > 0


@pytest.mark.parametrize("way", ["clone3", "popen"])
def test_floor_starts_processes_by_hand(way: str) -> None:
    """With functions of the product, whose names change."""
    with contextlib.closing(ByHand(way, None, None)) as hand:
        assert [len(steps) for steps in hand.start(2)] == [4, 4]
        assert hand.start_many(2, 2) > 0
