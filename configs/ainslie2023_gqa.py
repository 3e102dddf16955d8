"""Ainslie et al. 2023, "GQA": how many keys and values does a decoder need?

Question:    do H query heads over G < H key/value heads reach the quality of multi-head attention?
Scientific:  model.num_kv_heads of the decoder's self- and cross-attention; the encoder keeps multi-head (section 2.2).
Nuisance:    the seed: three a cell, compared seed by seed.
Fixed:       heads and their widths, depth, d_ff, batch, steps. Parameters fall with G: nothing is given back for them.
Decides:     validation/loss in nats a token, and BLEU.

  --config=configs/ainslie2023_gqa.py:paper      the shape of T5.1.1 XXL (64 heads) trained on WMT 2014 English-German.
                                                 Not expressed: pre-training on C4, Adafactor, relative positions, gated
                                                 GELU; the paper fine-tunes converted checkpoints. 1e10 parameters.
  --config=configs/ainslie2023_gqa.py:multi30k   2 + 2 layers of 8 heads, d_model 128, G = 8, 4, 2, 1, on 29,000 short
                                                 sentences. About half an hour on two CPU cores.

The cells are trained from scratch. The paper's own way, from the trained multi-head run and with 5 % of its steps:

  python -m experiments.heads grow --run=DIR/runs/BASE --to_groups=2 --kinds=decoder,cross --steps=100
  python -m experiments.heads grow --run=DIR/runs/BASE --to_groups=2 --kinds=decoder,cross --steps=100 --pool=first

(without --steps: right after conversion). Time against G: `python -m experiments.bench decode`.
Multi30k: see configs/vaswani2017_table3.py for the files at data/multi30k.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import vaswani2017_table3
from mha_jax.specs import UserError

_HEADS = {"paper": 64, "multi30k": 8}
_GROUPS = {"paper": (8, 1), "multi30k": (4, 2, 1)}


def get_config(profile: str = "paper") -> ConfigDict:
    if profile not in ("", "paper", "multi30k"):
        raise UserError(f"unknown profile {profile!r} of configs/ainslie2023_gqa.py; known are 'paper' and 'multi30k'")
    config = vaswani2017_table3.get_config(profile).unlock()
    config.name = f"ainslie2023-{profile or 'paper'}"
    if profile != "multi30k":
        config.model.update(
            num_layers=24, d_model=4096, num_heads=64, qk_dim=64, v_dim=64, d_ff=10240, max_length=512, norm="pre",
            normalization="rms", activation="gelu", use_ff_bias=False,
        )  # fmt: skip
        config.data.update(vocab_size=32128, length=512, batch_size=128, batch_tokens=None, buckets=None)
        config.optimizer.update(learning_rate=1e-3, schedule="constant")
        config.decoding.update(beam_size=1, length_penalty=0.0)
    return config.lock()


def _groups(profile: str, count: int) -> dict[str, Any]:
    return {"model.num_kv_heads": {"encoder": _HEADS[profile or "paper"], "decoder": count, "cross": count}}


def get_sweep(profile: str = "paper") -> Iterator[dict[str, Any]]:
    yield {}
    for count in _GROUPS[profile or "paper"]:
        yield _groups(profile, count)


def get_paper(profile: str = "paper") -> dict[str, Any]:
    """Table 1: WMT 2014 En-De, uptrained with 5 % of the steps and fine-tuned; one run a cell.

    The 8 of 64 key/value heads of GQA-8-XXL stand at 2 of 8 in the scaled profile, between multi-head and one group.
    """
    grouped = 8 if profile in ("", "paper") else 2
    rows = [
        ("MHA-XXL", {}, 28.4),
        ("GQA-8-XXL", _groups(profile, grouped), 28.4),
        ("MQA-XXL", _groups(profile, 1), 28.5),
    ]
    return {
        "source": "Ainslie et al. 2023, table 1 (arXiv:2305.13245): WMT 2014 En-De BLEU, from multi-head checkpoints",
        "confidence": "verified",
        "rows": [{"label": label, "cell": cell, "validation/bleu": bleu} for label, cell, bleu in rows],
    }


def get_claims(profile: str = "paper") -> list[dict[str, Any]]:
    """Quality alone, from scratch: the paper's claims are of converted checkpoints, and half of them are of time."""
    grouped = _groups(profile, 8 if profile in ("", "paper") else 2)
    bleu = {"metric": "validation/bleu", "margin": 0.5}
    return [
        {"text": "Grouped heads have nearly multi-head quality: BLEU to within 0.5.", **bleu, "between": [{}, grouped]},
        {
            "text": "One group for all heads has nearly multi-head quality too: BLEU to within 0.5.",
            **bleu,
            "between": [{}, _groups(profile, 1)],
        },
        {
            "text": "Grouped heads are better than one group for all.",
            "metric": "validation/loss",
            "better": grouped,
            "worse": _groups(profile, 1),
        },
    ]
