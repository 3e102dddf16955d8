"""A masked language model learns what both sides of a hidden byte say, and a classifier starts from it."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from mha_jax import config as configs
from mha_jax.specs import UserError
from mha_jax.training import loop
from mha_jax.training.finished import parent_state, restore_finished, with_parent
from mha_jax.training.metrics import read_metrics
from mha_jax.training.step import init_state
from tests import tiny

COLOURS, ANIMALS, PLACES = ("red", "old", "big"), ("cat", "dog", "hen"), ("mat", "hat", "bat")
LINES = [f"the {a} {b} sat on the {c}" for a in COLOURS for b in ANIMALS for c in PLACES]
# As BERT: norms after residuals and over embeddings, erf gelu, biases, learned positions.
BERT: dict[str, Any] = {
    "model__norm": "post",
    "model__embedding_norm": True,
    "model__activation": "gelu_exact",
    "model__use_bias": True,
    "model__scale_embedding": False,
    "optimizer__learning_rate": 5e-3,
    "mesh__data": 1,
    "model__num_layers": 1,
    "model__d_model": 32,
    "model__d_ff": 64,
    "model__max_length": 32,
    "data__length": 32,
    "training__eval_every": 200,
    "training__checkpoint_every": 200,
    "training__steps": 200,
}


CLASSIFIER: dict[str, Any] = {
    "data__source": "labelled",
    "data__files__train": "unused.tsv",
    "data__tfds_name": None,
    "data__num_classes": 3,
}


def train(folder: Path, config: Any) -> Path:
    """Trains the only seed in a directory with the name that a sweep would give it."""
    directory = folder / configs.run_id(config, {})
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(configs.plain(config)))
    part = loop.Part(config, configs.resolve(config), epath.Path(directory), lambda _: None)
    cache = epath.Path(folder / "cache")
    assert loop.train([part], cache_dir=cache, should_stop=lambda: False, progress=False) == ["done"]
    return directory


def last(directory: Path) -> dict[str, float]:
    """{"split/name": value} of the last evaluation."""
    return {f"{row['split']}/{row['name']}": row["value"] for row in read_metrics(directory / "metrics.jsonl")[0]}


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masked")
    (folder / "text.txt").write_text("\n\n".join(LINES * 20))
    overrides = {**BERT, "data__files__train": str(folder / "text.txt"), "data__batch_size": 32}
    return train(folder, tiny.config("masked_lm", seeds=(0,), **overrides))


@pytest.mark.slow
def test_a_masked_language_model_reads_both_sides(masked: Path):
    found, letters = last(masked), Counter("".join(LINES))
    shares = [count / letters.total() for count in letters.values()]
    blind = -sum(share * math.log(share) for share in shares)  # nats: what is known without a look around
    assert found["validation/loss"] < 0.7 * blind
    assert found["validation/accuracy"] > 2 * max(shares)
    assert found["validation/perplexity"] == pytest.approx(math.exp(found["validation/loss"]))


@pytest.mark.slow
def test_a_classifier_of_labelled_lines_starts_from_it_but_for_its_last_layers(masked: Path, tmp_path: Path):
    lines = [f"{animal}\t{line}\n" for line in LINES * 20 for animal in ANIMALS if animal in line]
    (tmp_path / "train.tsv").write_text("".join(lines))
    fields = {**BERT, **CLASSIFIER, "data__files__train": str(tmp_path / "train.tsv"), "model__pooling": "first"}
    config = tiny.config("classification", seeds=(0,), training__start_from=str(masked), **fields)
    run, of_parent = configs.resolve(config), configs.resolve(json.loads((masked / "config.json").read_text()))
    own, given = init_state(run), restore_finished(epath.Path(masked), of_parent).params
    start = with_parent(own, parent_state(run))["params"]
    for name in ("tokens", "encoder"):
        jax.tree.map(np.testing.assert_array_equal, start[name], given[name])
    for name in ("pooler", "classes"):
        jax.tree.map(np.testing.assert_array_equal, start[name], own["params"][name])
    assert start.keys() == {"tokens", "encoder", "pooler", "classes"}
    assert last(train(tmp_path, config))["validation/accuracy"] > 0.9  # a third by chance


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "overrides", "message"),
    [
        ("classification", {"model__use_bias": False}, "params/encoder/blocks/0/attention/key/bias is float32"),
        ("classification", {"model__d_ff": 63}, "params/encoder/blocks/0/feed_forward/down/kernel is float32[64, 32]"),
        ("lm", {}, "does not fit: constants/decoder/blocks/0/attention/gate is not there, wanted is float32[4]"),
    ],
)
def test_a_classifier_of_another_shape_does_not_start_from_it(masked: Path, task, overrides, message):
    fields = {**BERT, **(CLASSIFIER if task == "classification" else {}), **overrides}
    with pytest.raises(UserError) as caught:
        parent_state(configs.resolve(tiny.config(task, seeds=(0,), training__start_from=str(masked), **fields)))
    assert message in str(caught.value)
