"""Does more heads buy quality, or heads that a person can read? One head count after another, then what each head does.

Scientific:  model.num_heads, with qk_dim = v_dim = d_model / num_heads (parameters and matrix products stay).
Nuisance:    the seed: three a cell, compared seed by seed.
Fixed:       depth, width, batch, steps, schedule; nothing is tuned per cell.
Decides:     validation/loss beside what `experiments.heads roles`, `probe`, `importance` and `redundancy` say of the
             trained heads; docs/heads.md goes through it.

  --config=configs/roles.py:multi30k   a translator, English to German: encoder, decoder and cross-attention.
                                       About 25 minutes on two CPU cores.
  --config=configs/roles.py:masked     a masked language model whose heads are held against a treebank.
                                       About an hour on two CPU cores.

Multi30k: see configs/vaswani2017_table3.py. Text for `masked`: sentences of the English Web Treebank (Universal
Dependencies 2.16), and the English captions of Multi30k behind those of training, one a line:

  text() { zcat "$1" | sed -n 's/^# text = //p'; }
  mkdir -p data/ewt
  (text en_ewt-ud-train.conllu.gz; zcat data/multi30k/train.en.gz) > data/ewt/train.txt
  text en_ewt-ud-dev.conllu.gz > data/ewt/dev.txt; text en_ewt-ud-test.conllu.gz > data/ewt/test.txt
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import default, vaswani2017_table3
from mha_jax.specs import UserError


def get_config(profile: str = "multi30k") -> ConfigDict:
    if profile in ("", "multi30k"):
        config = vaswani2017_table3.get_config("multi30k").unlock()
        config.name = "roles-multi30k"
        config.optimizer.warmup_steps = 300
        config.training.update(steps=1200, eval_every=300, checkpoint_every=300, log_every=25)
        config.decoding.update(beam_size=1)
    elif profile == "masked":
        config = default.get_config().unlock()
        config.name = "roles-masked"
        config.task = "masked_lm"
        config.model.update(num_layers=2, d_model=128, d_ff=512, max_length=64)
        config.data.source = "text"
        config.data.files = ConfigDict(
            {
                split: f"data/ewt/{name}.txt"
                for split, name in (("train", "train"), ("validation", "dev"), ("test", "test"))
            }
        )
        config.data.update(tokenizer="bpe", vocab_size=2000, length=32, batch_size=64)
        # For the first thousand steps a masked model knows little but how often each token comes; 3e-3 stays there.
        config.optimizer.update(learning_rate=1e-3, warmup_steps=400)
        config.training.update(steps=3000, eval_every=500, checkpoint_every=500, log_every=50)
    else:
        raise UserError(f"unknown profile {profile!r} of configs/roles.py; known are 'multi30k' and 'masked'")
    return config.lock()


def get_sweep(profile: str = "multi30k") -> Iterator[dict[str, Any]]:
    for num_heads in (2, 8) if profile == "masked" else (1, 2, 4, 8, 16):
        yield {"model.num_heads": num_heads}
