"""Does an encoder that is there already know what a classification asks for? Its layers, trained on with new last ones.

  python -m experiments.train --config=configs/finetune.py:RUN --workdir=DIR --config.data.num_classes=6
      --config.data.files.train=train.tsv --config.data.files.test=test.tsv

RUN is a finished run of task masked_lm or classification, imported or trained here: its model, tokenizer and seeds are
taken over. Lines of the files are a label, a tab and a text; without a validation file a twentieth of training is one.

Fixed:       three epochs of about 5,000 texts at the rates of Devlin et al. 2019 (appendix A.3): 5e-5, batches of 32.
Decides:     test/accuracy.
Linear probe of the pooled vector: --config.training.freeze="('tokens','encoder')".
"""

import json

from etils import epath
from ml_collections import ConfigDict

from configs import default
from mha_jax.specs import ATTENTION_KINDS, UserError

_LENGTH = 128


def get_config(profile: str = "") -> ConfigDict:
    run = epath.Path(profile or "RUN")
    if not (run / "config.json").exists():
        raise UserError(f"configs/finetune.py:{run} names no run: give the directory of the one to start from")
    parent = json.loads((run / "config.json").read_text())
    if ATTENTION_KINDS[parent["task"]] != ("encoder",):
        raise UserError(f"{run} is of task {parent['task']!r}; a classifier starts from masked_lm or classification")
    config = default.get_config().unlock()
    config.name = f"finetune-{run.name}"
    config.task = "classification"
    config.seeds = tuple(parent["seeds"])
    with config.ignore_type():  # heads may be lists, a layer an entry
        config.model.update(parent["model"])
    # The run's own tokenizer.json says whether texts begin with [CLS], which BERT's classifier reads.
    file, tokenizer = run / "tokenizer.json", parent["data"]["tokenizer"]
    config.model.pooling = "first" if tokenizer in ("wordpiece", "json") else "mean"
    config.data.update(source="labelled", vocab_size=parent["data"]["vocab_size"], batch_size=32)
    config.data.length = min(config.model.max_length, _LENGTH)
    if file.exists():
        config.data.update(tokenizer="json", tokenizer_file=str(file))
    config.optimizer.update(
        learning_rate=5e-5, warmup_steps=50, final_fraction=0.0, beta2=0.999, epsilon=1e-6, clip_norm=1.0
    )
    config.training.update(start_from=str(run), steps=500)
    return config.lock()
