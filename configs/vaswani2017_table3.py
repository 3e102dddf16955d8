"""Vaswani et al. 2017, "Attention Is All You Need", table 3: rows base, (A) and (B).

Question:    (A) does the head count matter at constant compute? (B) how small may a key be?
Scientific:  (A) num_heads with qk_dim = v_dim = 512 / num_heads; (B) qk_dim alone, v_dim stays 64 (parameters shrink).
Nuisance:    the seed: three a cell, compared seed by seed (the paper ran each cell once).
Fixed:       depth, d_ff, batch, steps, schedule; nothing is tuned per cell.
Decides:     validation/loss in nats a token; the paper's columns are perplexity a word piece, and BLEU.

  --config=configs/vaswani2017_table3.py:paper      WMT 2014 English-German, published hyperparameters; validation is
                                                    newstest2013. About 12 hours a cell and seed on 8 P100.
  --config=configs/vaswani2017_table3.py:multi30k   the paper's heads (d_model 512, the same widths) in a smaller stack
                                                    on 29,000 short sentences: the order of the cells is the
                                                    question, as the numbers are of another corpus.

Multi30k: github.com/multi30k/dataset, folder data/task1/raw (Elliott et al. 2016). Put or link the folder that holds
train.en.gz, train.de.gz, val.*.gz and test_2016_flickr.*.gz at data/multi30k.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import default
from mha_jax.specs import UserError


def get_config(profile: str = "paper") -> ConfigDict:
    if profile not in ("", "paper", "multi30k"):
        raise UserError(
            f"unknown profile {profile!r} of configs/vaswani2017_table3.py; known are 'paper' and 'multi30k'"
        )
    config = default.get_config().unlock()
    config.name = "vaswani2017"
    config.task = "translation"
    config.model.update(
        num_layers=6, d_model=512, num_heads=8, qk_dim=64, v_dim=64, d_ff=2048, max_length=256,
        positions="sinusoidal", norm="post", activation="relu", dropout_rate=0.1,
    )  # fmt: skip
    config.data.update(
        source="tfds", tfds_name="wmt14_translate/de-en", languages=("en", "de"), tokenizer="bpe", vocab_size=37000,
        length=256, batch_size=64, batch_tokens=25000, buckets=(16, 32, 48, 64, 96, 128, 256),
    )  # fmt: skip
    config.optimizer.update(
        name="adam", learning_rate=1.0, schedule="vaswani", warmup_steps=4000, weight_decay=0.0,
        beta1=0.9, beta2=0.98, epsilon=1e-9,
    )  # fmt: skip
    config.training.update(steps=100_000, eval_every=5000, checkpoint_every=5000, log_every=100, label_smoothing=0.1)
    config.decoding.update(beam_size=4, length_penalty=0.6)
    if profile == "multi30k":
        _multi30k(config)
    return config.lock()


def _multi30k(config: ConfigDict) -> None:
    folder = "data/multi30k"
    config.name = "vaswani2017-multi30k"
    config.model.update(num_layers=3, d_ff=1024, max_length=64, dropout_rate=0.3)
    config.data.source = "parallel"
    config.data.tfds_name = None
    config.data.languages = None
    config.data.files = ConfigDict(
        {
            split: (f"{folder}/{stem}.en.gz", f"{folder}/{stem}.de.gz")
            for split, stem in (("train", "train"), ("validation", "val"), ("test", "test_2016_flickr"))
        }
    )
    config.data.update(vocab_size=8000, length=64, batch_tokens=4096, buckets=(16, 32, 64))
    # Half the paper's factor with a quarter of its warm-up: the peak rate stays the published 7e-4.
    config.optimizer.update(learning_rate=0.5, warmup_steps=1000)
    config.training.update(steps=3000, eval_every=500, checkpoint_every=500, log_every=20)


_HEADS = {h: {"model.num_heads": h, "model.qk_dim": 512 // h, "model.v_dim": 512 // h} for h in (1, 4, 16, 32)}
_KEYS = {k: {"model.qk_dim": k} for k in (16, 32)}


def get_sweep(profile: str = "paper") -> Iterator[dict[str, Any]]:
    yield {}
    yield from _HEADS.values()
    yield from _KEYS.values()


PAPER = {
    "source": "Vaswani et al. 2017, table 3 (arXiv:1706.03762): WMT 2014 English-German, newstest2013, one run a cell",
    "confidence": "verified",
    "rows": [
        {
            "label": label,
            "cell": cell,
            "validation/perplexity": perplexity,
            "validation/bleu": bleu,
            "parameters": count,
        }
        for label, cell, perplexity, bleu, count in (
            ("base", {}, 4.92, 25.8, 65e6),
            ("(A) h=1", _HEADS[1], 5.29, 24.9, None),
            ("(A) h=4", _HEADS[4], 5.00, 25.5, None),
            ("(A) h=16", _HEADS[16], 4.91, 25.8, None),
            ("(A) h=32", _HEADS[32], 5.01, 25.4, None),
            ("(B) d_k=16", _KEYS[16], 5.16, 25.1, 58e6),
            ("(B) d_k=32", _KEYS[32], 5.01, 25.4, 60e6),
        )
    ],
}

CLAIMS = [
    {"text": text, "metric": "validation/loss", "better": better, "worse": worse}
    for text, better, worse in (
        ("A single head is worse than 8, at the same compute.", {}, _HEADS[1]),
        ("So are 32 heads: the best count lies inside.", {}, _HEADS[32]),
        ("Halving the key size hurts (64 to 32).", {}, _KEYS[32]),
        ("Halving it again hurts again (32 to 16).", _KEYS[32], _KEYS[16]),
    )
] + [
    {
        "text": "8 and 16 heads tie on BLEU, to within 0.5.",
        "metric": "validation/bleu",
        "between": [{}, _HEADS[16]],
        "margin": 0.5,
    },
]
