"""A run is a function of its config: stopped, killed or left alone, it ends with the same bits."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath

from mha_jax import config as configs
from mha_jax.config import override
from mha_jax.specs import UserError
from mha_jax.training import loop
from mha_jax.training.checkpoints import Checkpoints
from mha_jax.training.evaluation import average
from mha_jax.training.metrics import read_metrics
from mha_jax.training.parallel import make_program
from tests import tiny

TIMINGS = {"step_seconds", "tokens_per_second", "compile_seconds", "peak_bytes"}
TEXT = "".join(
    f"the {a} {b} sat on the {c}\n\n"
    for a in ("red", "old", "big")
    for b in ("cat", "dog", "hen")
    for c in ("mat", "hat", "bat")
)


def text_config(folder, **overrides):
    path = folder / "corpus.txt"
    if not path.exists():
        path.write_text(TEXT * 3)
    values = {"data__files__train": str(path), "model__dropout_rate": 0.1, "mesh__data": 1, **overrides}
    return tiny.config("lm", **values)


def train(folder, name, config, stop_at=None):
    """Trains in folder/name; `stop_at` asks to stop before that step."""
    asked = []

    def should_stop():
        asked.append(None)
        return stop_at is not None and len(asked) > stop_at

    facts = {}
    part = loop.Part(config, configs.resolve(config), epath.Path(folder / name), facts.update)
    (outcome,) = loop.train([part], cache_dir=epath.Path(folder / "cache"), should_stop=should_stop, progress=False)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome, facts


def result(directory, config):
    """Final arrays by name, and the metrics without timings."""
    program = make_program(configs.resolve(config), jax.devices())
    restored = Checkpoints(directory / "checkpoints", keep_last=2).restore(program.abstract_state())
    rows = [row for row in read_metrics(directory / "metrics.jsonl")[0] if row["name"] not in TIMINGS]
    assert restored is not None
    leaves = jax.tree_util.tree_leaves_with_path(restored.state)
    return restored.step, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}, rows


def assert_same(a, b):
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        np.testing.assert_array_equal(a[1][name], b[1][name], err_msg=name)
    assert a[2] == b[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("loop")


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "stops"), [("jit", (7, 6)), ("pmap", (7,))])
def test_a_run_stopped_at_odd_steps_ends_with_the_same_bits_and_metrics(tmp_path, parallel, stops):
    config = text_config(tmp_path, parallel=parallel, mesh__data=2, model__num_layers=1)
    assert train(tmp_path, "whole", config)[0] == "done"
    for stop in stops:
        assert train(tmp_path, "parts", config, stop_at=stop)[0] == "stopped"
    assert train(tmp_path, "parts", config)[0] == "done"
    assert_same(result(tmp_path / "whole", config), result(tmp_path / "parts", config))


_CHILD = """
import sys
from pathlib import Path
from tests.training.test_loop import long_config, train
train(Path(sys.argv[1]), "killed", long_config(Path(sys.argv[1])))
"""


def long_config(folder):
    periods = {"training__eval_every": 100, "training__checkpoint_every": 40}
    return text_config(folder, training__steps=200, model__num_layers=1, **periods)


@pytest.mark.slow
def test_train_200_equals_train_80_kill_9_and_train_to_200(tmp_path):
    config = long_config(tmp_path)
    train(tmp_path, "whole", config)
    child = subprocess.Popen([sys.executable, "-c", _CHILD, str(tmp_path)], env={**os.environ, "PYTHONPATH": "."})
    seal = tmp_path / "killed" / "checkpoints" / "80" / "manifest.json"
    deadline = time.time() + 240
    while not seal.exists() and time.time() < deadline and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert train(tmp_path, "killed", config)[0] == "done"
    assert_same(result(tmp_path / "whole", config), result(tmp_path / "killed", config))


@pytest.fixture(scope="module")
def averaged(folder):
    """A run whose last two checkpoints are averaged: its config, and how it ended."""
    config = text_config(folder, training__average_last=2, model__num_layers=1)
    return config, *train(folder, "averaged", config)


@pytest.mark.slow
def test_a_run_writes_the_metrics_that_the_report_reads(folder, averaged):
    _, outcome, facts = averaged
    assert outcome == "done"
    rows = read_metrics(folder / "averaged" / "metrics.jsonl")[0]
    last = {(row["split"], row["name"]) for row in rows if row["step"] == 20 and row["seed"] == 1}
    for split in ("validation", "test"):
        assert {(split, "loss"), (split, "perplexity"), (split, "bits_per_byte"), (split, "accuracy")} <= last
    assert {
        ("train", "loss"),
        ("train", "learning_rate"),
        ("train", "step_seconds"),
        ("train", "compile_seconds"),
    } <= last
    keys = [(row["step"], row["seed"], row["split"], row["name"]) for row in rows]
    assert len(keys) == len(set(keys))
    assert set(facts["seconds"]) >= {"train", "eval", "compile", "data", "save"}
    assert facts["parameters"] > 0 and facts["predicted_peak_bytes"] > 0
    assert json.dumps(facts)


@pytest.mark.slow
def test_the_final_evaluation_is_of_the_averaged_checkpoints(folder, averaged):
    train(folder, "plain", text_config(folder, training__average_last=1, model__num_layers=1))
    loss = {
        name: [
            r["value"]
            for r in read_metrics(folder / name / "metrics.jsonl")[0]
            if (r["step"], r["split"], r["name"]) == (20, "test", "loss")
        ]
        for name in ("plain", "averaged")
    }
    assert not np.allclose(loss["plain"], loss["averaged"], rtol=1e-4)
    abstract = make_program(configs.resolve(averaged[0]), jax.devices()).abstract_state()
    saved = Checkpoints(folder / "averaged" / "checkpoints", keep_last=2)
    a, b = (saved.restore(abstract, step=step).state["params"] for step in (10, 20))
    expected = jax.tree.map(lambda x, y: (x + y) / 2, a, b)
    jax.tree.map(np.testing.assert_allclose, average([a, b]), expected)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_with_step_seed_and_layer(tmp_path):
    rate = {"optimizer__learning_rate": 1e30, "optimizer__schedule": "constant", "optimizer__warmup_steps": 0}
    config = text_config(tmp_path, model__num_layers=1, **rate)
    with pytest.raises(loop.NonFiniteLoss, match=r"not finite at step 2, seed 0; first seen in .*decoder layer 0"):
        train(tmp_path, "run", config)


@pytest.mark.slow
def test_a_translator_is_scored_on_every_split_in_its_order(tmp_path):
    words = {"a": "w", "b": "x", "c": "y", "d": "z"}
    pairs = [(f"{a} {b}", f"{words[b]} {words[a]} {words[b]} {words[a]}") for a in words for b in words] * 4
    files = {}
    for split in ("train", "validation", "test"):
        files[split] = tuple(str(tmp_path / f"{split}.{side}") for side in ("en", "de"))
        for side, path in enumerate(files[split]):
            (tmp_path / path).write_text(
                "".join(pair[side] + "\n" for pair in (pairs if split == "train" else pairs[:11]))
            )
    widths = {f"data__files__{split}": paths for split, paths in files.items()} | {
        "mesh__data": 1,
        "decoding__batch_size": 4,
    }
    config = tiny.config(
        "translation", (0,), **widths, training__steps=250, training__eval_every=250, training__checkpoint_every=250,
        model__num_layers=1, model__d_model=24, model__d_ff=48, model__v_dim=6, model__qk_dim=6,
        optimizer__learning_rate=1e-2,
    )  # fmt: skip
    outcome, facts = train(tmp_path, "run", config)
    scores = {
        r["split"]: r["value"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")[0] if r["name"] == "bleu"
    }
    written = (tmp_path / "run" / "translations" / "test.seed0.txt").read_text().splitlines()
    assert outcome == "done" and set(scores) == {"validation", "test"}
    assert facts["bleu_signature"].startswith("nrefs:1")
    # Learned by heart, so that a line out of order shows.
    assert written == [target for _, target in pairs[:11]]
    assert scores["test"] == pytest.approx(100)


@pytest.mark.slow
def test_checkpoints_of_another_config_are_refused(folder, averaged):
    with pytest.raises(UserError, match="holds checkpoints of config"):
        train(folder, "averaged", override(averaged[0], {"optimizer.learning_rate": 1e-4}))
