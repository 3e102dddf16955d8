"""Michel, Levy and Neubig 2019, "Are Sixteen Heads Really Better than One?": the model whose heads are then cut.

Question:    which heads of a trained translator matter, in which kind of attention, and how many can go?
Scientific:  nothing varies in training; `experiments.heads importance`, `curve` and `prune` cut heads afterwards.
Nuisance:    the seed: three models, each cut on its own.
Fixed:       everything of training.
Decides:     loss in nats a token and BLEU against heads left, beside random and reversed orders.

  --config=configs/michel2019.py:paper      WMT 2014 English-French, Transformer-large: 6 layers, 16 heads, d_model 1024
                                            (Ott et al. 2018, whose trained model the paper cuts).
  --config=configs/michel2019.py:multi30k   3 + 3 layers of 8 heads, d_model 128, on 29,000 short sentences.

Multi30k: see configs/vaswani2017_table3.py for the files at data/multi30k.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import vaswani2017_table3
from mha_jax.specs import UserError


def get_config(profile: str = "paper") -> ConfigDict:
    if profile not in ("", "paper", "multi30k"):
        raise UserError(f"unknown profile {profile!r} of configs/michel2019.py; known are 'paper' and 'multi30k'")
    config = vaswani2017_table3.get_config(profile).unlock()
    config.name = f"michel2019-{profile or 'paper'}"
    if profile == "multi30k":
        config.model.update(num_layers=3)
        config.training.update(steps=2500, eval_every=250, checkpoint_every=250)
    else:
        config.model.update(num_layers=6, d_model=1024, num_heads=16, d_ff=4096)
        config.data.update(tfds_name="wmt14_translate/fr-en", languages=("en", "fr"), vocab_size=44000)
    return config.lock()


def get_sweep(profile: str = "paper") -> Iterator[dict[str, Any]]:
    yield {}


# Figures 3a and 4, read off vector graphics: BLEU on newstest2013 with 0, 10, ... 100 % of all heads, or a kind, cut.
PAPER = {
    "source": "Michel et al. 2019 (arXiv:1905.10650), WMT14 En-Fr, Transformer-large, newstest2013, one model",
    "confidence": "verified",
    "rows": [{"label": "all heads", "cell": {}, "validation/bleu": 36.05}],
}
CURVES = {
    "all, by gradient": (36.05, 36.06, 35.63, 34.12, 32.48, 28.02, 24.13, 6.86, 0.36, 0.25, 0.01),
    "all, by leave-one-out": (36.05, 35.15, 33.82, 20.66, 8.58, 6.32, 3.17, 1.25, 0.34, 0.10, 0.01),
    "encoder only": (36.05, 36.21, 36.01, 35.64, 34.98, 34.47, 32.15, 30.17, 28.06, 23.38, 8.98),
    "cross only": (36.05, 36.13, 35.90, 35.91, 34.11, 32.92, 29.37, 10.59, 0.88, 0.49, 0.32),
    "decoder only": (36.05, 36.04, 36.16, 35.96, 35.65, 34.96, 34.26, 32.14, 30.54, 21.42, 3.06),
}


def _at(removed: float, kind: str = "all", order: str = "gradient_normalised") -> dict[str, Any]:
    return {"curve": "bleu", "kind": kind, "order": order, "removed": removed}


def get_cuts(profile: str = "paper") -> list[dict[str, Any]]:
    """What the paper says about cutting heads, for `experiments.heads claims`."""
    significant = {"significant": "leave_one_out", "level": 0.01}
    return [
        {
            "text": "Cutting any one head rarely matters: fewer than a sixth of the heads change the loss "
            "significantly (paper: 8 of 96 change BLEU).",
            "less": significant,
            "than": {"value": 1 / 6},
        },
        {
            "text": "A layer's self-attention in the encoder survives with its best head: the median layer loses less "
            "than 0.05 nats.",
            "less": {"best_alone": "encoder"},
            "than": {"value": 0.05},
        },
        {
            "text": "The exception is the last cross-attention, which needs more than one head: it loses more than the "
            "decoder's last self-attention.",
            "less": {"best_alone": "decoder", "layer": -1},
            "than": {"best_alone": "cross", "layer": -1},
        },
        {
            "text": "A fifth of all heads goes for less than half a BLEU point, cut by gradient.",
            "less": _at(0.0),
            "than": _at(0.2),
            "margin": -0.5,
        },
        {
            "text": "Without further training no model survives on few heads: four fifths cut cost more than half of "
            "the BLEU.",
            "less": _at(0.8),
            "than": {**_at(0.0), "times": 0.5},
        },
        {
            "text": "Cutting by gradient keeps more than cutting at random, at half of the heads.",
            "less": _at(0.5, order="random"),
            "than": _at(0.5),
        },
        {
            "text": "Past 60 %, cross-attention falls further than the encoder's self-attention.",
            "less": _at(0.7, "cross"),
            "than": _at(0.7, "encoder"),
        },
        {
            "text": "Past 60 %, cross-attention falls further than the decoder's self-attention.",
            "less": _at(0.7, "cross"),
            "than": _at(0.7, "decoder"),
        },
    ]
