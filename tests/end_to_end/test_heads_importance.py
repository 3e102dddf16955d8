"""`heads importance` writes one table, as JSON, CSV and pictures; bad input is one line, and nothing is written."""

import csv
import json
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import heads
from experiments.verbs.importance import even_batches
from mha_jax.config import resolve
from mha_jax.heads.importance import importance
from mha_jax.sweeps.opening import open_run
from mha_jax.sweeps.store import RunDirectory
from mha_jax.training.checkpoints import Checkpoints
from mha_jax.training.step import init_state
from tests import tiny

MEASURES = ("norm", "gradient", "leave_one_out")
KINDS = {"encoder": 3, "decoder": 1, "cross": 2}


def create(directory, task, **overrides):
    """A run that counts as finished: its state is that of step 0."""
    config = tiny.config(task, data__source="parallel" if task == "translation" else "text", **overrides)
    run = RunDirectory.create(directory, config)
    checkpoints = Checkpoints(run.path / "checkpoints", keep_last=1)
    checkpoints.save(config.training.steps, jax.jit(lambda: init_state(resolve(config)))(), {})
    checkpoints.close()
    return Path(run.path)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def text_run(workdir):
    (workdir / "text.txt").write_text("\n\n".join(f"line {n} of the text" for n in range(200)))
    return create(
        workdir / "runs" / "text", "lm", data__files__train=str(workdir / "text.txt"), data__validation_fraction=0.3
    )


@pytest.fixture(scope="module")
def pair_run(workdir):
    for language in ("en", "de"):
        (workdir / f"text.{language}").write_text("".join(f"{language} {n}\n" for n in range(40)))
    return create(
        workdir / "runs" / "pairs",
        "translation",
        data__files__train=(str(workdir / "text.en"), str(workdir / "text.de")),
        data__validation_fraction=0.4,
        data__buckets=(13,),
        model__num_heads=KINDS,
        model__num_layers=1,
        model__init="independent",
    )


def call(script, run, *arguments):
    return script(heads.main, "importance", f"--run={run}", *arguments)


@pytest.mark.slow
def test_one_table_of_every_kind_of_attention_for_every_seed(script, pair_run):
    ended = call(script, pair_run, "--batches=2", f"--measures={','.join(MEASURES)}")
    assert ended.code == 0, ended.err
    for title in ("encoder self-attention", "decoder self-attention", "cross-attention"):
        assert title in ended.out
    found = json.loads((pair_run / "heads" / "importance.json").read_text())
    assert (found["data"], tuple(found["measures"])) == ("validation, 2 batches", MEASURES)
    assert found["seeds"].keys() == {"0", "1"} and found["seed_stability"].keys() == set(MEASURES)

    opened = open_run(pair_run)
    tables = importance("translation", opened.model(1), even_batches(opened, "validation", 2), MEASURES)
    for measure, table in tables.items():
        written = found["seeds"]["1"][measure]
        assert written["exact"] == table.exact and written["stability"] == table.stability
        for name, mean_H in table.mean.items():
            np.testing.assert_allclose(written["heads"][name]["mean"], mean_H, rtol=1e-6, atol=1e-9)
            assert (written["heads"][name]["standard_error"] is None) == table.exact
            assert (written["heads"][name]["p_holm"] is None) == (measure != "leave_one_out")

    rows = list(csv.DictReader((pair_run / "heads" / "importance.csv").read_text().splitlines()))
    assert len(rows) == 2 * sum(KINDS.values())
    last = rows[-1]
    assert (last["seed"], last["kind"], last["layer"], last["head"]) == ("1", "cross", "0", "1")
    gradient = found["seeds"]["1"]["gradient"]["heads"]["decoder/0/cross_attention"]
    assert float(last["gradient"]) == gradient["mean"][1]
    assert float(last["gradient se"]) == gradient["standard_error"][1]
    for name in ("importance.svg", "importance.png", "importance-seed1.svg", "importance-seed1.png"):
        assert (pair_run / "heads" / name).stat().st_size > 1000


@pytest.mark.slow
def test_a_chosen_seed_measure_and_attention_are_all_that_is_written(script, text_run):
    ended = call(script, text_run, "--seed=1", "--measures=norm,query_norm", "--layers=decoder/1/attention")
    assert ended.code == 0, ended.err
    found = json.loads((text_run / "heads" / "importance.json").read_text())
    assert found["measures"] == ["norm", "query_norm"] and found["seeds"].keys() == {"1"}
    assert list(found["seeds"]["1"]["norm"]["heads"]) == ["decoder/1/attention"]
    assert found["seed_stability"] == {"norm": None, "query_norm": None}


def test_batches_are_spread_over_the_split(text_run):
    opened = open_run(text_run)
    every = list(opened.batches("validation"))
    assert len(every) > 7
    chosen = even_batches(opened, "validation", 3)
    for batch, place in zip(chosen, (0, round((len(every) - 1) / 2), len(every) - 1), strict=True):
        np.testing.assert_array_equal(batch["inputs"], every[place]["inputs"])
    assert len(even_batches(opened, "validation", 1000)) == len(every)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--seed=5"], "has no seed 5; it has [0, 1]"),
        (["--split=holdout"], "has no split 'holdout'; it has"),
        (["--measures=relevance"], "there is no measure 'relevance'; there are query_norm"),
        (["--measures="], "there is no measure ''"),
        (
            ["--layers=decoder/2/attention"],
            "there is no attention 'decoder/2/attention'; there are decoder/0/attention",
        ),
        (["--batches=1"], "importance over 1 batch has no error bar; give at least 2"),
        (["--batches=0"], "importance needs data"),
        (["--batches=some"], "some"),
    ],
)
def test_what_does_not_exist_is_told_in_one_line(script, text_run, arguments, told):
    before = {path: path.stat().st_mtime_ns for path in text_run.rglob("*")}
    assert told in call(script, text_run, *arguments).complaint
    assert before == {path: path.stat().st_mtime_ns for path in text_run.rglob("*")}


def test_a_run_that_is_none_or_not_finished_is_told(script, tmp_path):
    assert "--run is missing" in script(heads.main, "importance").complaint
    assert "is no run directory" in call(script, tmp_path / "none").complaint
    RunDirectory.create(tmp_path / "half", tiny.config())
    assert "has no finished checkpoint of step 20" in call(script, tmp_path / "half").complaint
    assert not (tmp_path / "half" / "heads").exists()


def test_a_last_batch_of_one_example_and_padding_is_passed_over():
    weights = [[[1, 1], [1, 0]], [[1, 0], [0, 1]], [[1, 1], [0, 0]]]
    made = [{"weights": np.array(one), "number": i} for i, one in enumerate(weights)]
    opened = types.SimpleNamespace(batches=lambda split: iter(made))
    assert [batch["number"] for batch in even_batches(opened, "validation", 8)] == [0, 1]
