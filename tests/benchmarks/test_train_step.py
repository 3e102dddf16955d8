"""The train_step benchmark at a tiny size."""

import json

import pytest

from experiments import bench
from mha_jax.benchmarks import tables, train_step
from mha_jax.models import cost
from mha_jax.specs import UserError

TINY = ["--num_layers=1", "--d_model=12", "--d_ff=29", "--length=7", "--batch_size=3"]


def test_head_counts_share_one_width_one_cost_and_one_number_of_parameters():
    runs = [train_step.language_model(heads) for heads in (1, 4, 16, 32)]
    assert {shape.num_heads * shape.qk_dim for run in runs for shape in run.model.heads("decoder")} == {256}
    assert len({cost.flops_per_token(run) for run in runs}) == len({cost.parameters(run) for run in runs}) == 1


@pytest.mark.slow
def test_the_script_times_every_contestant_prints_a_table_and_writes_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_step, "torch_steps", lambda run, batch, steps: ({}, ["PyTorch is left out here"]))
    out = tmp_path / "bench.json"
    assert bench.main(["bench", "train_step", "--heads=3", "--rounds=2", "--profile", f"--out={out}", *TINY]) == 0
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert "| 3 x 4" in printed and "PyTorch is left out here" in printed and "attention core" in printed
    for row in result["rows"]:
        assert {name: len(seconds) for name, seconds in row["seconds"].items()} == {"mha_jax": 2, "matmul floor": 2}
    assert result["command"].startswith("python -m experiments.bench train_step --heads=3")
    assert result["environment"]["versions"]["jax"]
    for rows in result["profile"].values():
        *parts, step = rows
        assert step["part"] == "step"
        assert sum(row["ms"] for row in parts) == pytest.approx(step["ms"])


def test_table_shows_medians_spread_and_paired_ratios():
    seconds = {"mha_jax": [0.2, 0.4, 0.3], "matmul floor": [0.1, 0.1, 0.2], "PyTorch eager": [0.1, 0.1, 0.1]}
    run = train_step.language_model(4, d_model=12, length=10, batch_size=3)
    table = tables.step_table([train_step.result_row(run, seconds)])
    assert table.splitlines()[2].split(" | ") == [
        "| 4 x 3        ",
        "300.0 (200.0-400.0)",
        "     100",
        "100.0 (100.0-200.0)",
        "         50 %",
        "100.0 (100.0-100.0)",
        "       3.00 (2.00-4.00) |",
    ]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "say what to time"),
        (["train_step", "--heads=4,x"], "--heads=4,x must be positive integers"),
        (["train_step", "--heads=5"], "d_model=256 is not a multiple of num_heads=5"),
        (["train_step", "--rounds=0"], "rounds"),
        (["train_step", "surplus"], "'surplus' is not understood"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(argv, words):
    with pytest.raises(UserError, match=words):
        bench.main(["bench", *argv])
