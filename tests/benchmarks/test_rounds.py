"""Contestants in turns."""

import pytest

from mha_jax.benchmarks.rounds import paired_ratio, race, summary


def test_every_contestant_runs_once_a_round_and_follows_each_other_one_at_times():
    calls = []
    seconds = race({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=20)
    assert "".join(calls[:9]) == 3 * "abc"
    rounds = ["".join(calls[start : start + 3]) for start in range(9, len(calls), 3)]
    assert {"".join(sorted(order)) for order in rounds} == {"abc"} and len(rounds) == 20
    assert {pair for order in rounds for pair in (order[:2], order[1:])} == {"ab", "ac", "ba", "bc", "ca", "cb"}
    assert {name: len(values) for name, values in seconds.items()} == {"a": 20, "b": 20, "c": 20}


def test_each_call_is_charged_to_its_own_contestant(monkeypatch):
    clock = [0.0]

    def takes(seconds):
        clock[0] += seconds

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    seconds = race({"short": lambda: takes(2.0), "long": lambda: takes(7.0)}, rounds=3)
    assert seconds == {"short": [2.0] * 3, "long": [7.0] * 3}


def test_the_ratio_is_taken_round_by_round():
    ratio = paired_ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0])
    assert ratio == {"median": 3.0, "min": 2.0, "max": 4.0}
    with pytest.raises(ValueError):
        paired_ratio([1.0, 2.0], [1.0])


def test_summary_is_median_least_and_greatest():
    assert summary([5.0, 1.0, 3.0, 11.0]) == {"median": 4.0, "min": 1.0, "max": 11.0}
