"""Vaswani et al. 2017, "Attention Is All You Need", table 3: rows base, (A) and (B).

Question:    (A) does the head count matter at constant compute? (B) how small may a key be?
Scientific:  (A) num_heads with qk_dim = v_dim = d_model / num_heads; (B) qk_dim alone, v_dim stays (parameters shrink).
Nuisance:    the seed: three a cell, compared seed by seed (the paper ran each cell once).
Fixed:       depth, d_ff, batch, steps, schedule; nothing is tuned per cell.
Decides:     validation/loss in nats a token; the paper's columns are perplexity a word piece, and BLEU.

  --config=configs/vaswani2017_table3.py:paper      WMT 2014 English-German, published hyperparameters; validation is
                                                    newstest2013. About 12 hours a cell and seed on 8 P100.
  --config=configs/vaswani2017_table3.py:multi30k   a quarter of the width (d_model 128, 2 + 2 layers) on 29,000 short
                                                    sentences: the order of the cells is the question, as the numbers
                                                    are of another corpus. About 50 minutes on two CPU cores.

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
        num_layers=6, d_model=512, num_heads=8, d_ff=2048, max_length=256,
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
    config.model.update(num_layers=2, d_model=128, d_ff=256, max_length=48)
    config.data.source = "parallel"
    config.data.tfds_name = None
    config.data.languages = None
    config.data.files = ConfigDict(
        {
            split: (f"{folder}/{stem}.en.gz", f"{folder}/{stem}.de.gz")
            for split, stem in (("train", "train"), ("validation", "val"), ("test", "test_2016_flickr"))
        }
    )
    config.data.update(vocab_size=2000, length=48, batch_tokens=960, buckets=(20, 32, 48))
    # A small model bears a higher peak than the published 7e-4: this one is 2.2e-3.
    config.optimizer.update(learning_rate=0.5, warmup_steps=400)
    config.training.update(steps=2000, eval_every=250, checkpoint_every=250, log_every=25)


_COUNTS = {"paper": (1, 4, 16, 32), "multi30k": (1, 2, 4, 16)}
_KEY_SIZES = {"paper": {"half": 32, "quarter": 16}, "multi30k": {"quarter": 4}}


def _heads(count: int) -> dict[str, Any]:
    return {"model.num_heads": count}


def _key(size: int) -> dict[str, Any]:
    """Row (B) shrinks the keys alone: values keep the width of d_model / 8."""
    return {"model.qk_dim": size}


def get_sweep(profile: str = "paper") -> Iterator[dict[str, Any]]:
    yield {}
    yield from map(_heads, _COUNTS[profile or "paper"])
    yield from map(_key, _KEY_SIZES[profile or "paper"].values())


def get_paper(profile: str = "paper") -> dict[str, Any]:
    """What Table 3 prints. Row (B) is matched by the share of the base's key size: 64 -> 16 there is 16 -> 4 here."""
    sizes = _KEY_SIZES[profile or "paper"]
    rows = [
        ("base", {}, 4.92, 25.8, 65e6),
        ("(A) h=1", _heads(1), 5.29, 24.9, None),
        ("(A) h=4", _heads(4), 5.00, 25.5, None),
        ("(A) h=16", _heads(16), 4.91, 25.8, None),
        ("(A) h=32", _heads(32), 5.01, 25.4, None),
        ("(B) d_k/4", _key(sizes["quarter"]), 5.16, 25.1, 58e6),
    ]
    if "half" in sizes:
        rows.append(("(B) d_k/2", _key(sizes["half"]), 5.01, 25.4, 60e6))
    names = ("label", "cell", "validation/perplexity", "validation/bleu", "parameters")
    return {
        "source": "Vaswani et al. 2017, table 3 (arXiv:1706.03762): WMT 2014 En-De, newstest2013, one run a cell",
        "confidence": "verified",
        "rows": [dict(zip(names, row, strict=True)) for row in rows],
    }


def get_claims(profile: str = "paper") -> list[dict[str, Any]]:
    """What the table is cited for, in the cells that the profile has."""
    sizes = _KEY_SIZES[profile or "paper"]
    most = max(_COUNTS[profile or "paper"])
    order = [
        ("A single head is worse than 8, at the same compute.", {}, _heads(1)),
        ("A quarter of the key size is worse than the whole.", {}, _key(sizes["quarter"])),
    ]
    if "half" in sizes:
        order += [
            ("Halving the key size hurts (64 to 32).", {}, _key(sizes["half"])),
            ("Halving it again hurts again (32 to 16).", _key(sizes["half"]), _key(sizes["quarter"])),
            (f"{most} heads are worse than 8: the best count lies inside.", {}, _heads(most)),
        ]
    claims = [
        {"text": text, "metric": "validation/loss", "better": better, "worse": worse} for text, better, worse in order
    ]
    tie = {"text": "8 and 16 heads tie on BLEU, to within 0.5.", "metric": "validation/bleu", "margin": 0.5}
    return [*claims, {**tie, "between": [{}, _heads(16)]}]
