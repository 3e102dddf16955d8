"""A masked language model learns what both sides of a hidden byte say, and a classifier reads labelled lines."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from mha_jax import config as configs
from mha_jax.training import loop
from mha_jax.training.metrics import read_metrics
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
    "model__d_model": 32,
    "model__d_ff": 64,
    "model__max_length": 32,
    "data__length": 32,
    "training__eval_every": 200,
    "training__checkpoint_every": 200,
    "training__steps": 200,
}


def last(folder: Path, config: Any) -> dict[str, float]:
    """Trains, and returns {"split/name": value} of the last evaluation of the only seed."""
    part = loop.Part(config, configs.resolve(config), epath.Path(folder / "run"), lambda _: None)
    assert loop.train([part], cache_dir=epath.Path(folder / "cache"), should_stop=lambda: False, progress=False) == [
        "done"
    ]
    rows = read_metrics(folder / "run/metrics.jsonl")[0]
    return {f"{row['split']}/{row['name']}": row["value"] for row in rows}


@pytest.mark.slow
def test_a_masked_language_model_reads_both_sides(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(LINES * 20))
    overrides = {**BERT, "data__files__train": str(tmp_path / "text.txt"), "data__batch_size": 32}
    found = last(tmp_path, tiny.config("masked_lm", seeds=(0,), **overrides))
    letters = Counter("".join(LINES))
    shares = [count / letters.total() for count in letters.values()]
    blind = -sum(share * math.log(share) for share in shares)  # nats: what is known without a look around
    assert found["validation/loss"] < 0.7 * blind
    assert found["validation/accuracy"] > 2 * max(shares)
    assert found["validation/perplexity"] == pytest.approx(math.exp(found["validation/loss"]))


@pytest.mark.slow
def test_a_classifier_learns_from_labelled_lines(tmp_path):
    lines = [f"{animal}\t{line}\n" for line in LINES * 20 for animal in ANIMALS if animal in line]
    (tmp_path / "train.tsv").write_text("".join(lines))
    overrides = {**BERT, "data__source": "labelled", "data__files__train": str(tmp_path / "train.tsv")}
    overrides |= {"data__tfds_name": None, "data__num_classes": 3, "model__pooling": "first"}
    found = last(tmp_path, tiny.config("classification", seeds=(0,), **overrides))
    assert found["validation/accuracy"] > 0.9  # a third by chance
