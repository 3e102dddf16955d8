import json
import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax.training.metrics import MetricsLog, bleu, perplexity, read_metrics


def test_one_line_a_seed_and_name(tmp_path):
    log = MetricsLog(tmp_path / "run", seeds=(3, 7))
    log.write(5, "train", {"loss": jnp.asarray([1.5, 2.5]), "learning_rate": 0.25})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 5, "seed": 3, "split": "train", "name": "loss", "value": 1.5},
        {"step": 5, "seed": 7, "split": "train", "name": "loss", "value": 2.5},
        {"step": 5, "seed": 3, "split": "train", "name": "learning_rate", "value": 0.25},
        {"step": 5, "seed": 7, "split": "train", "name": "learning_rate", "value": 0.25},
    ]


def test_values_for_another_number_of_seeds_are_refused(tmp_path):
    with pytest.raises(ValueError):
        MetricsLog(tmp_path, seeds=(0, 1)).write(0, "train", {"loss": np.ones(3)})


def test_values_that_are_not_finite_are_null_in_the_file_and_nan_when_read(tmp_path):
    MetricsLog(tmp_path, seeds=(0, 1, 2)).write(1, "train", {"loss": np.asarray([np.nan, np.inf, 2.0])})
    assert (tmp_path / "metrics.jsonl").read_text().count('"value": null') == 2
    rows, problems = read_metrics(tmp_path / "metrics.jsonl")
    np.testing.assert_equal([row["value"] for row in rows], [math.nan, math.nan, 2.0])
    assert problems == []


def test_float32_values_read_back_exactly(tmp_path):
    values = np.random.default_rng(0).normal(size=2).astype(np.float32)
    MetricsLog(tmp_path, seeds=(0, 1)).write(1, "train", {"loss": values})
    rows, _ = read_metrics(tmp_path / "metrics.jsonl")
    assert [np.float32(row["value"]) for row in rows] == list(values)


def test_tensorboard_has_a_folder_for_each_seed(tmp_path):
    log = MetricsLog(tmp_path, seeds=(3, 7))
    log.write(5, "validation", {"loss": np.asarray([1.0, 2.0])})
    log.close()
    folders = sorted(path for path in (tmp_path / "tensorboard").iterdir())
    assert [path.name for path in folders] == ["seed3", "seed7"]
    for folder in folders:
        (events,) = folder.iterdir()
        assert b"validation/loss" in events.read_bytes()


def test_rewind_drops_later_steps_and_the_broken_last_line(tmp_path):
    log = MetricsLog(tmp_path, seeds=(0,))
    for step in (1, 2, 3):
        log.write(step, "train", {"loss": np.asarray([math.nan if step == 1 else step])})
    with log.path.open("a") as file:
        file.write('{"step": 3, "seed": 0, "spl')
    (told,) = MetricsLog(tmp_path, seeds=(0,)).rewind(2)
    assert "line 4 is corrupt" in told
    log.write(3, "train", {"loss": np.asarray([30.0])})
    rows, problems = read_metrics(log.path)
    np.testing.assert_equal([(row["step"], row["value"]) for row in rows], [(1, math.nan), (2, 2.0), (3, 30.0)])
    assert problems == []
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("metrics")] == ["metrics.jsonl"]


def test_rewind_of_a_run_without_metrics_does_nothing(tmp_path):
    log = MetricsLog(tmp_path, seeds=(0,))
    log.rewind(-1)
    assert read_metrics(log.path) == ([], [])


@pytest.mark.parametrize(
    "line",
    [
        b"not json",
        b"\xff\xfe",
        b"[1, 2]",
        b'{"step": 1, "seed": 0, "split": "train", "name": "loss"}',
        b'{"step": 1, "seed": 0, "split": "train", "name": "loss", "value": "1.0"}',
        b'{"step": "1", "seed": 0, "split": "train", "name": "loss", "value": 1.0}',
    ],
)
def test_a_corrupt_line_is_named_by_its_number_and_the_others_are_read(tmp_path, line):
    log = MetricsLog(tmp_path, seeds=(0,))
    log.write(1, "train", {"loss": 1.0})
    good = log.path.read_bytes()
    log.path.write_bytes(good + line + b"\n" + good)
    rows, problems = read_metrics(log.path)
    assert len(rows) == 2
    assert len(problems) == 1 and "metrics.jsonl: line 2 is corrupt" in problems[0]


def test_perplexity_is_the_exponential_of_the_loss():
    np.testing.assert_allclose(perplexity(np.log([4.92, 5.29])), [4.92, 5.29], rtol=1e-12)
    assert perplexity(1e4) == math.inf


def test_bleu_of_a_hand_counted_corpus():
    # 8 words against 9, one wrong: n-gram precisions 7/8, 5/7, 3/6 and 1/5 with a brevity penalty of exp(1 - 9/8).
    hypothesis, reference = "the cat sat upon the mat at noon", "the cat sat on the mat at noon today"
    score, signature = bleu([hypothesis], [reference])
    precisions = (7 / 8) * (5 / 7) * (3 / 6) * (1 / 5)
    assert score == pytest.approx(100 * math.exp(1 - 9 / 8) * precisions**0.25, rel=1e-9)
    assert "tok:13a" in signature and "version:" in signature


def test_bleu_of_the_reference_itself_is_100_and_unpaired_lines_are_refused():
    lines = ["a b c d e", "f g h i j k"]
    assert bleu(lines, lines)[0] == pytest.approx(100.0)
    with pytest.raises(ValueError, match="2 hypotheses do not pair with 1 references"):
        bleu(lines, lines[:1])


def test_writing_metrics_does_not_wait_for_torch_where_it_is_installed(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] in ("torch", "tensorboardX")]:
        monkeypatch.delitem(sys.modules, name)
    log = MetricsLog(tmp_path, (0,))
    log.write(1, "train", {"loss": [2.0]})
    log.close()
    assert "torch" not in sys.modules
    assert list((tmp_path / "tensorboard" / "seed0").iterdir())
