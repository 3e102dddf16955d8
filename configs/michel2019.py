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
