"""The sparse benchmark: exponents, their interval, and time against what is visible."""

import math

import numpy as np
import pytest
from scipy import stats

from mha_jax.benchmarks import sparse
from mha_jax.benchmarks.programs import Program
from mha_jax.specs import UserError


def test_exponent_of_an_exact_power_is_found_with_no_width():
    fit = sparse.exponent([2048, 4096, 8192, 16384], [3e-9 * n**1.5 for n in (2048, 4096, 8192, 16384)])
    assert fit is not None
    assert [fit["exponent"], fit["low"], fit["high"]] == pytest.approx([1.5] * 3, abs=1e-6)


def test_interval_is_the_t_interval_of_the_slope():
    lengths, seconds = [2, 4, 8, 16], [1.0, 2.5, 3.5, 9.0]
    x, y = np.log(lengths), np.log(seconds)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    residuals = y - y.mean() - slope * (x - x.mean())
    error = math.sqrt((residuals**2).sum() / 2 / ((x - x.mean()) ** 2).sum())
    fit = sparse.exponent(lengths, seconds)
    assert fit is not None
    assert fit["exponent"] == pytest.approx(slope)
    assert fit["high"] - fit["low"] == pytest.approx(2 * stats.t.ppf(0.975, 2) * error)


def test_two_lengths_leave_no_interval():
    assert sparse.exponent([2048, 4096], [1.0, 2.0]) is None


def test_fits_leave_short_lengths_out():
    def row(length, seconds):
        return {"mode": "forward", "rule": "window", "length": length, "ms": {"median": seconds}}

    rows = [row(1024, 100.0), row(2048, 2.0), row(4096, 4.0), row(8192, 8.0)]
    (found,) = sparse.fits(rows, 2048)
    assert (found["mode"], found["rule"]) == ("forward", "window")
    assert found["fit"]["exponent"] == pytest.approx(1.0) and found["fit"]["lengths"] == 3


@pytest.mark.parametrize("length", [97, 256])
def test_every_rule_is_causal_and_sees_itself(length):
    for label, rule in sparse.rules_at(length, 11).values():
        mask = np.asarray(rule.mask(length, length))[0, 0]
        assert not np.triu(mask, 1).any(), label
        assert mask.diagonal().all(), label


def test_cost_is_time_over_visible_share_of_dense_and_dense_stops_at_its_limit(monkeypatch):
    monkeypatch.setattr(sparse, "core_program", lambda *_: Program(lambda: None, lambda result: result, None))
    monkeypatch.setattr(
        sparse, "race", lambda calls, _: {c: [8.0, 4.0, 6.0] if c[1] == "dense" else [2.0, 2.0, 3.0] for c in calls}
    )
    setting = sparse.Setting(lengths=(64, 128), rules=("dense", "window"), modes=("forward",), window=7, dense_limit=64)
    result = sparse.measure(setting)
    assert [(row["rule"], row["length"]) for row in result["rows"]] == [
        ("dense causal", 64),
        ("window 7", 64),
        ("window 7", 128),
    ]
    dense, window, long = result["rows"]
    visible = (7 * 64 - 21) / (64 * 65 / 2)  # 7 a row, less 6 + 5 + ... + 1 in the first rows
    assert dense["visible"] == 1 and window["visible"] == pytest.approx(visible)
    assert window["speedup"] == {"median": 2.0, "min": 2.0, "max": 4.0}
    assert window["cost_ratio"]["median"] == pytest.approx(0.5 / visible)
    assert "speedup" not in long


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rules": ("window", "diagonal")}, "rules='diagonal' is not one of 'dense', 'window'"),
        ({"num_heads": 7}, "d_model=256 is not a multiple of num_heads=7"),
        ({"backend": "abacus"}, "backend='abacus'"),
        ({"window": 0}, "window"),
    ],
)
def test_wrong_settings_are_told_before_anything_runs(given, words):
    with pytest.raises(UserError, match=words):
        sparse.Setting(**given)
