"""Kovaleva et al. 2019, "Revealing the Dark Secrets of BERT": few shapes of maps, and heads that can be disabled.

Question:    how many attention maps could hold something of their text, and do models need all of their heads?
Scientific:  nothing varies in training; `experiments.heads roles` and `importance` look into the trained model.
Nuisance:    the seed: three models.
Fixed:       everything of training.
Decides:     shares of maps by shape, and heads without which the loss is lower.

  --config=configs/kovaleva2019.py:small   `small` of configs/clark2019.py: a masked language model of 2 layers of 8
                                           heads. About 5 minutes on two CPU cores.
  --config=configs/kovaleva2019.py:paper   `paper` of it, the shape of BERT-base.

R being its run:

  python -m experiments.heads roles --run=R
  python -m experiments.heads importance --run=R --measures=leave_one_out,uniform
  python -m experiments.heads claims --run=R --config=configs/kovaleva2019.py:small

`uniform` disables a head as the paper does, by even attention in place of its own. The paper fine-tuned BERT on seven
tasks of GLUE and looked at scores; here it is the loss of the masked words. Shapes are told by rules
(mha_jax/heads/shapes.py), as the labels that the paper's classifier learned from are not public, so that shares are
like its own only roughly. With a checkpoint of your own, made a run by `python -m experiments.heads import`, the same
three commands look into that (:paper); it is one seed, so that claims stay undecided and the tables have the numbers.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import clark2019
from mha_jax.specs import UserError


def get_config(profile: str = "small") -> ConfigDict:
    if profile not in ("", "small", "paper"):
        raise UserError(f"unknown profile {profile!r} of configs/kovaleva2019.py; known are 'small' and 'paper'")
    config = clark2019.get_config(profile).unlock()
    config.name = f"kovaleva2019-{profile or 'small'}"
    return config.lock()


def get_sweep(profile: str = "small") -> Iterator[dict[str, Any]]:
    yield {}


PAPER = {
    "source": "Kovaleva et al. 2019 (arXiv:1908.08593), BERT-base fine-tuned on GLUE: shapes and scores, not a loss",
    "confidence": "verified",
    "rows": [],
}
# Section 4.1: upper bounds of the share of heads that could hold something of their text, on MRPC and on QQP.
HETEROGENEOUS = (0.32, 0.61)


def get_cuts(profile: str = "small") -> list[dict[str, Any]]:
    """What the paper says, for `experiments.heads claims`, from roles.json and importance.json."""
    low, high = HETEROGENEOUS
    return [
        {
            "text": "The same few shapes repeat: vertical, diagonal, both and block make more of the maps than the "
            f"paper left them on its richest task ({100 * (1 - high):.0f} % on QQP; {100 * (1 - low):.0f} on MRPC).",
            "less": {"value": 1 - high},
            "than": {"shapes": ["vertical", "diagonal", "vertical+diagonal", "block"]},
        },
        {
            "text": "Disabling some single heads by even attention helps (paper: on every task tried).",
            "less": {"value": 0.0},
            "than": {"helped": "uniform", "level": 0.05},
        },
        {
            "text": "So does cutting some single heads.",
            "less": {"value": 0.0},
            "than": {"helped": "leave_one_out", "level": 0.05},
        },
    ]
