"""configs/finetune.py: a classifier with the model and the tokenizer of the run that it starts from."""

import json

import pytest

from mha_jax import config as configs
from mha_jax.specs import UserError
from mha_jax.sweeps import grid
from tests import tiny

FILES = {"data.num_classes": 2, "data.files.train": "train.tsv"}


def written(folder, task, **fields):
    folder.mkdir()
    config = configs.plain(tiny.config(task, **fields))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_model_vocabulary_and_seeds_are_those_of_the_run(tmp_path):
    run = written(tmp_path / "run", "masked_lm", model__num_heads=(1, 3), model__norm="post", seeds=(4, 7))
    found = configs.resolve(grid.load(f"configs/finetune.py:{run}", FILES).config)
    parent = configs.resolve(json.loads((run / "config.json").read_text()))
    assert found.task == "classification" and found.seeds == (4, 7)
    assert found.model == parent.model and found.data.tokens == parent.data.tokens
    assert found.data.tokenizer == "bytes" and found.training.start_from == str(run)


def test_the_runs_own_tokenizer_is_read_and_bert_reads_its_first_token(tmp_path):
    fields = {"data__tokenizer": "wordpiece", "data__tokenizer_file": "gone/vocab.txt", "data__vocab_size": 50}
    run = written(tmp_path / "run", "masked_lm", **fields)
    (run / "tokenizer.json").write_text("{}")
    found = configs.resolve(grid.load(f"configs/finetune.py:{run}", FILES).config)
    assert (found.data.tokenizer, found.data.tokenizer_file) == ("json", str(run / "tokenizer.json"))
    assert (found.data.vocab_size, found.model.pooling) == (50, "first")


def test_what_gives_no_encoder_is_one_line(tmp_path):
    for name, message in (
        ("configs/finetune.py", "names no run"),
        (f"configs/finetune.py:{tmp_path}", "names no run"),
        (f"configs/finetune.py:{written(tmp_path / 'lm', 'lm')}", "is of task 'lm'; a classifier starts from"),
    ):
        with pytest.raises(UserError, match=message):
            grid.load(name)
