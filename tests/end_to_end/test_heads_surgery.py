"""Runs made out of runs: smaller or larger, opened with one call, trained on; bad input leaves everything as it is."""

import json
import random
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import heads, train
from experiments.verbs.curve import measured_on
from mha_jax.sweeps.opening import open_run
from mha_jax.sweeps.store import RunDirectory
from tests.end_to_end.conftest import _CACHE_SETTINGS

FLAGS = {
    "model.num_heads": 4, "model.num_kv_heads": 2, "model.num_layers": 2, "training.steps": 4, "training.eval_every": 4,
    "training.checkpoint_every": 2, "training.average_last": 2, "data.source": "text", "mesh.data": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A trained run of two seeds, with two of its heads closed."""
    settings = {name: getattr(jax.config, name) for name in _CACHE_SETTINGS}
    workdir = tmp_path_factory.mktemp("sweep")
    words = random.Random(5).choices(("head", "query", "key", "value", "wide", "narrow"), k=1800)
    # Short: what is held out of it is evaluated for every run that is made.
    (workdir / "text.txt").write_text("\n\n".join(" ".join(words[i : i + 30]) for i in range(0, len(words), 30)))
    values = FLAGS | {"data.files.train": workdir / "text.txt"}
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    assert (
        train.main(["train", "--config=configs/default.py:smoke", f"--workdir={workdir}", "--noprogress", *flags]) == 0
    )
    for name, value in settings.items():
        jax.config.update(name, value)
    return next((workdir / "runs").iterdir())


def made(ended):
    """The run directory that the last line names."""
    assert ended.code == 0, ended.out + ended.err
    return ended.out.strip().splitlines()[-1]


def logits(opened, seed, batch):
    return np.asarray(jax.jit(lambda model, tokens: model(tokens))(opened.model(seed), batch["inputs"]))


@pytest.mark.slow
def test_a_pruned_run_is_its_parent_with_gates_closed_and_trains_on(script, parent):
    gone = "decoder/0/attention:1;decoder/1/attention:2,3"
    ended = script(heads.main, "prune", f"--run={parent}", "--seed=1", f"--heads={gone}", "--noprogress")
    child, before = open_run(made(ended)), open_run(parent)
    assert child.config["parent"] == {
        "run": parent.name, "seed": 1, "step": 4, "surgery": "prune", "order": "named",
        "kept": {"decoder/0/attention": [0, 2, 3], "decoder/1/attention": [0, 1]},
    }  # fmt: skip
    assert [shape.num_heads for shape in child.run.model.heads("decoder")] == [3, 2]
    assert child.directory.state == "done" and child.run.seeds == (1,)
    model, batch = before.model(1), next(before.batches())
    for block, closed in zip(model.decoder.blocks, ([1], [2, 3]), strict=True):
        gate_H = np.ones(4, np.float32)
        gate_H[closed] = 0
        block.attention.gate[...] = jax.numpy.asarray(gate_H)
    masked = np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, batch["inputs"]))
    # Logits of size 1 in float32, summed in another order.
    np.testing.assert_allclose(logits(child, 1, batch), masked, rtol=0, atol=2e-6)
    report = json.loads((child.directory.path / "heads" / "prune.json").read_text())
    assert report["validation"]["after"]["loss"] == pytest.approx(report["final"]["validation/loss"], rel=1e-6)
    assert report["validation"]["before"]["loss"] != report["validation"]["after"]["loss"]

    further = script(heads.main, "prune", f"--run={child.directory.path}", "--count=1", "--order=gradient", "--steps=3",
                     "--batches=2", "--noprogress")  # fmt: skip
    grandchild = open_run(made(further))
    assert (grandchild.step, grandchild.config["parent"]["run"]) == (7, child.directory.run_id)
    assert sum(shape.num_heads for shape in grandchild.run.model.heads("decoder")) == 4
    again = script(train.main, f"--run={grandchild.directory.path}")
    assert again.code == 0


@pytest.mark.slow
def test_a_pruned_run_opens_twice_to_the_last_bit_and_is_neither_made_twice_nor_drawn_anew(script, parent):
    arguments = ["prune", f"--run={parent}", "--seed=0", "--fraction=0.5", "--order=random", "--noprogress"]
    path = made(script(heads.main, *arguments))
    one, two = open_run(path), open_run(path)
    for a, b in zip(jax.tree.leaves(one.state), jax.tree.leaves(two.state), strict=True):
        np.testing.assert_array_equal(a, b)
    kept = one.config["parent"]["kept"]
    source = open_run(parent).params["decoder"]["blocks"]
    for layer, part in one.params["decoder"]["blocks"].items():
        numbers = np.asarray(kept[f"decoder/{layer}/attention"], int)
        whole = np.asarray(source[layer]["attention"]["query"]["kernel"])[:1]
        np.testing.assert_array_equal(part["attention"]["query"]["kernel"], np.take(whole, numbers, axis=-2))
    batch = next(one.batches())
    np.testing.assert_array_equal(logits(one, 0, batch), logits(two, 0, batch))

    assert "is there already" in script(heads.main, *arguments).complaint
    for file in (Path(path) / "checkpoints").rglob("*"):
        if file.is_file():
            file.unlink()
    RunDirectory(path).update(state="stopped")
    assert "has no other start" in script(train.main, f"--run={path}").complaint


@pytest.mark.slow
def test_grown_runs_tell_what_became_of_the_loss(script, parent):
    seed = [f"--run={parent}", "--seed=1", "--noprogress"]
    split = Path(made(script(heads.main, "grow", *seed, "--split=all")))
    grouped = Path(made(script(heads.main, "grow", *seed, "--to_groups=1")))
    told = [json.loads((path / "heads" / "grow.json").read_text()) for path in (split, grouped)]
    exact, close = (one["validation"]["after"]["loss"] - one["validation"]["before"]["loss"] for one in told)
    # A mean of some hundred losses of size 5 in float32; four steps of training leave groups far from alike.
    assert abs(exact) < 1e-5 < 1e-4 < abs(close)
    assert told[0]["parent"]["exact"] and set(told[0]["heads"]["after"].values()) == {8}
    assert [shape.num_kv_heads for shape in open_run(grouped).run.model.heads("decoder")] == [1, 1]


WRONG = {
    "no run": (["prune", "--fraction=0.5"], "--run is missing"),
    "no choice": (["prune", "--run={run}"], "exactly one of --fraction"),
    "two choices": (["prune", "--run={run}", "--fraction=0.5", "--count=1"], "exactly one of --fraction"),
    "no such head": (["prune", "--run={run}", "--heads=decoder/0/attention:4"], "has no head 4; there are 4, 0 to 3"),
    "no such layer": (["prune", "--run={run}", "--heads=decoder/7/attention:0"], "no attention 'decoder/7/attention'"),
    "too many": (["prune", "--run={run}", "--count=9"], "--count=9 heads cannot be removed: the model has 8"),
    "fraction": (["prune", "--run={run}", "--fraction=1.5"], "fraction=1.5"),
    "a group that is read": (
        ["prune", "--run={run}", "--groups=decoder/0/attention:1"],
        "group 1 cannot go while head 2",
    ),
    "not understood": (["prune", "--run={run}", "--heads=decoder/0/attention"], "is not understood"),
    "no such measure": (
        ["prune", "--run={run}", "--fraction=0.5", "--order=beauty"],
        "--order='beauty' is not 'random'",
    ),
    "no such seed": (["prune", "--run={run}", "--fraction=0.5", "--seed=7"], "has no seed 7"),
    "steps": (["prune", "--run={run}", "--count=1", "--steps=-1", "--order=random"], "steps=-1 must be at least 0"),
    "no way to grow": (["grow", "--run={run}"], "exactly one of --split, --add, --merge, --to_groups"),
    "groups that do not divide": (["grow", "--run={run}", "--to_groups=3"], "to_groups=3 must divide them: 1 and 2"),
    "no pair": (
        ["grow", "--run={run}", "--merge=decoder/0/attention:1"],
        "is not understood at 'decoder/0/attention:1'",
    ),
    "a group others read": (["grow", "--run={run}", "--merge=decoder/0/attention:0+2"], "which other heads read too"),
    "bleu of no translation": (["curve", "--run={run}", "--bleu"], "--bleu needs a run of task 'translation'"),
    "no such kind": (["curve", "--run={run}", "--kinds=cross"], "has 'cross'; this model has all"),
}


@pytest.mark.slow
def test_what_is_wrong_is_one_line_and_makes_no_run(script, parent):
    before = sorted(path.name for path in parent.parent.iterdir())
    for arguments, message in WRONG.values():
        assert message in script(heads.main, *(a.format(run=parent) for a in arguments)).complaint
    unfinished = RunDirectory.create(parent.parent.parent / "more" / "runs" / "new", RunDirectory(parent).config)
    complaint = script(heads.main, "prune", f"--run={unfinished.path}", "--fraction=0.5").complaint
    assert "has no finished checkpoint of step 4" in complaint
    assert sorted(path.name for path in parent.parent.iterdir()) == before


def test_a_curve_over_a_part_of_the_split_reads_texts_of_all_lengths():
    batches = [{"number": n, "weights": np.ones((2, 3 + n))} for n in range(9)]  # the shortest texts first
    opened = types.SimpleNamespace(batches=lambda split: iter(batches))
    assert [one["number"] for one in measured_on(opened, "validation", 3)] == [0, 4, 8]
    assert len(measured_on(opened, "validation", None)) == 9


@pytest.mark.slow
def test_the_curve_begins_at_the_models_loss_and_ends_without_heads(script, parent):
    # What `heads importance` has written is what heads are ordered by.
    means = {"decoder/0/attention": [3, 2, 1, 0], "decoder/1/attention": [7, 6, 5, 4]}
    written = {seed: {"leave_one_out": {"heads": {name: {"mean": m} for name, m in means.items()}}} for seed in "01"}
    (parent / "heads").mkdir(exist_ok=True)
    (parent / "heads" / "importance.json").write_text(json.dumps({"data": "validation, 2 batches", "seeds": written}))
    ended = script(heads.main, "curve", f"--run={parent}", "--order=leave_one_out", "--points=4", "--draws=2")
    assert ended.code == 0, ended.err
    found = json.loads((parent / "heads" / "curve.json").read_text())
    rows = found["rows"]
    assert {row["order"] for row in rows} == {"leave_one_out", "reversed-leave_one_out", "random"}
    assert len(rows) == 2 * 4 * 5
    for seed in (0, 1):
        starts = {row["loss"] for row in rows if row["seed"] == seed and row["removed"] == 0}
        ends = {row["loss"] for row in rows if row["seed"] == seed and row["left"] == 0}
        assert len(starts) == len(ends) == 1 and starts != ends
    for name in ("curve.csv", "curve.svg", "curve.png"):
        assert (parent / "heads" / name).stat().st_size > 0
