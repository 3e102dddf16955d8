"""The benchmark of ablation at a tiny size: all ways do the same work."""

import sys

import numpy as np
import pytest

from mha_jax.benchmarks import ablation, tables
from mha_jax.benchmarks.rounds import summary
from mha_jax.heads.ablation import leave_one_out
from mha_jax.specs import UserError

TINY = ablation.Setting(num_layers=2, num_heads=3, d_model=12, d_ff=14, length=5, batch_size=2, rounds=2, processes=1)


@pytest.mark.slow
def test_the_loop_leaves_out_the_heads_that_the_kept_prefix_does():
    model, batches = ablation.drawn(TINY)
    ours = leave_one_out("lm", model, batches).sums["loss"]
    loop = ablation.one_at_a_time(model, batches)
    assert list(loop) == list(ours) == ["decoder/0/attention", "decoder/1/attention"]
    for name, sums_HE in loop.items():
        assert sums_HE.shape == (3, 4)
        # Sums of 5 losses of some 6 nats, in float32.
        np.testing.assert_allclose(ours[name], sums_HE, rtol=1e-6)
    one = ablation.one_at_a_time(model, batches, {"decoder/1/attention": [2]})
    np.testing.assert_array_equal(one["decoder/1/attention"], loop["decoder/1/attention"][2:])


def test_all_heads_are_reckoned_from_processes_of_one_head_each(monkeypatch):
    started = []

    def seconds(setting, head):
        started.append(head)
        return 12.0 if head is None else 3.0

    monkeypatch.setattr(ablation, "_process_seconds", seconds)
    setting = ablation.Setting(num_layers=4, num_heads=3, processes=2, d_model=12)
    found = ablation._processes(setting)
    assert started == [None, 0, None, 11]
    assert found["seconds"] == {ablation.ALL_HEADS: [12.0, 12.0], ablation.ONE_HEAD: [36.0, 36.0]}
    assert found["ratio"]["median"] == 3.0


def test_the_table_has_a_row_a_way():
    seconds = {ablation.OURS: [1.0, 2.0], ablation.LOOP: [2.0, 4.0]}
    processes = {ablation.ALL_HEADS: [10.0], ablation.ONE_HEAD: [300.0]}
    result = {
        "heads": 144,
        "first_seconds": {ablation.OURS: 3.0, ablation.LOOP: 4.0},
        "summary": {name: summary(values) for name, values in seconds.items()},
        "ratio": summary([2.0, 2.0]),
        "processes": {
            "summary": {name: summary(values) for name, values in processes.items()},
            "ratio": summary([30.0]),
        },
        "difference": 4e-7,
    }
    table, note = tables.ablation_table(result).split("\n\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert rows[0] == [ablation.OURS, "1.50 (1.00-2.00)", "3.0", "1"]
    assert rows[1] == [ablation.LOOP, "3.00 (2.00-4.00)", "4.0", "2.00 (2.00-2.00)"]
    assert rows[3] == [ablation.ONE_HEAD, "300.0 (300.0-300.0)", "-", "30.0 (30.0-30.0)"]
    assert "4.0e-07 nats" in note


@pytest.mark.slow
def test_every_way_is_timed_and_their_losses_agree(monkeypatch):
    started = []

    def run(command, check):
        started.append((*command[:2], check))
        exec(command[2], {})  # here, where all is imported and compiled

    monkeypatch.setattr(ablation.subprocess, "run", run)
    found = ablation.measure(TINY)
    assert started == [(sys.executable, "-c", True)] * 2
    assert found["heads"] == 6
    assert {name: len(values) for name, values in found["seconds"].items()} == {ablation.OURS: 2, ablation.LOOP: 2}
    assert found["difference"] < 1e-5
    assert all(values[0] > 0 for values in found["processes"]["seconds"].values())


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="d_model=96 is not a multiple of num_heads=5"):
        ablation.Setting(num_heads=5)
