"""From a config to a spec: faults in one line with what would be right; ids follow what decides a result."""

import re

import pytest

from mha_jax import config as configs
from mha_jax.specs import HeadShape, UserError
from tests import tiny

WRONG = [
    (
        {"model__num_heads": 5, "model__qk_dim": None},
        "d_model=12 is not a multiple of num_heads=5; 1, 2, 3, 4, 6 and 12",
    ),
    (
        {"model__num_kv_heads": 3},
        "num_heads=4 is not a multiple of num_kv_heads=3; 1, 2 and 4 fit, or give head_to_group",
    ),
    (
        {"model__num_kv_heads": 3, "model__head_to_group": (0, 1, 2)},
        "head_to_group has 3 entries; num_heads=4 needs one",
    ),
    (
        {"model__num_kv_heads": 2, "model__head_to_group": (0, 1, 2, 0)},
        "names group 2; num_kv_heads=2 has groups 0 to 1",
    ),
    ({"model__num_heads": -1}, "num_heads=-1 must be an integer of at least 0"),
    ({"model__d_ff": 0}, "model.d_ff=0 must be an integer of at least 1"),
    ({"model__v_dim": 0}, "v_dim=0 must be an integer of at least 1"),
    ({"model__num_heads": (4, 4, 4)}, "model.num_heads lists 3 layers for 'decoder'; model.num_layers=2"),
    ({"model__num_heads": {"encoder": 4}}, "model.num_heads has no entry for 'decoder'; it has 'encoder'"),
    ({"model__norm": "both"}, "model.norm='both' is not one of"),
    ({"model__dropout_rate": 1.0}, "model.dropout_rate=1.0 must be at least 0 and below 1"),
    ({"model__positions": "rope", "model__qk_dim": 3}, "qk_dim=3 must be even"),
    ({"model__init": "shared", "model__qk_dim": 4}, "4 heads of width 4 need 16 columns, at most 12 fit"),
    ({"model__match": "params"}, "needs model.match_base"),
    ({"data__length": 17}, "data.length=17 is longer than model.max_length=16 positions"),
    ({"data__vocab_size": 300}, "data.vocab_size=300 does not fit data.tokenizer='bytes', which has 260"),
    ({"model__norm_epsilon": 0.0}, "model.norm_epsilon=0.0 must be positive"),
    (
        {"data__tokenizer": "llama2c", "data__vocab_size": 300},
        "data.tokenizer_file=None does not fit data.tokenizer='llama2c'",
    ),
    ({"data__tokenizer_file": "t.bin"}, "data.tokenizer_file='t.bin' does not fit data.tokenizer='bytes'"),
    ({"data__tokenizer": "bpe"}, "data.vocab_size=None must be an integer of at least 260"),
    ({"data__source": "tfds"}, "needs data.tfds_name"),
    ({"data__files__train": None}, "needs data.files.train"),
    ({"seeds": (1, 1)}, "must be distinct integers"),
    ({"task": "translation"}, "task='translation' needs data.source='parallel' or 'tfds', not 'text'"),
    ({"task": "classification"}, "needs data.num_classes"),
    ({"task": "masked_lm", "model__tied_output": False}, "model.tied_output=False is for task='lm', not 'masked_lm'"),
    ({"optimizer__learning_rate": 0.0}, "optimizer.learning_rate=0.0 must be positive"),
    (
        {"training__average_last": 3},
        "training.average_last=3 averages more checkpoints than training.keep_last=2 keeps",
    ),
    ({"mesh__seed": 4}, "2 seeds do not split over mesh.seed=4 devices"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_is_wrong_is_one_line_with_the_value_and_what_would_be_right(overrides, message):
    with pytest.raises(UserError) as caught:
        configs.resolve(configs.override(tiny.config(), {k.replace("__", "."): v for k, v in overrides.items()}))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.num_heds", "model.heads.count", "optimiser.beta1"])
def test_an_unknown_field_is_refused(name):
    with pytest.raises(UserError, match=f"unknown config field {re.escape(repr(name))}"):
        configs.override(tiny.config(), {name: 3})


def test_an_unknown_field_is_answered_with_the_nearest_one():
    with pytest.raises(UserError, match=r"did you mean 'model\.num_heads'"):
        configs.override(tiny.config(), {"model.num_heds": 3})


def test_a_field_that_is_missing_is_named():
    tree = configs.plain(tiny.config())
    del tree["model"]["d_ff"]
    with pytest.raises(UserError, match=r"config field 'model.d_ff' is missing"):
        configs.resolve(tree)


def test_heads_may_differ_by_kind_and_by_layer():
    spec = tiny.run("translation", model__num_heads={"encoder": (1, 4), "decoder": 2, "cross": (0, 3)}).model
    counts = {kind: [shape.num_heads for shape in spec.heads(kind)] for kind in ("encoder", "decoder", "cross")}
    assert counts == {"encoder": [1, 4], "decoder": [2, 2], "cross": [0, 3]}


def test_neighbouring_heads_share_a_group():
    assert HeadShape.resolve(12, 6, 2).groups == (0, 0, 0, 1, 1, 1)
    assert HeadShape.resolve(12, 3, 2, head_to_group=(1, 0, 1)).groups == (1, 0, 1)


def test_the_hash_follows_what_decides_the_result_and_nothing_else():
    base = configs.config_hash(tiny.config())
    assert configs.config_hash(tiny.config(seeds=(0, 2))) != base
    older = configs.plain(tiny.config())
    del older["model"]["token_types"], older["model"]["pooling"], older["model"]["tied_output"]
    assert configs.config_hash(older) == base and configs.diff(older, tiny.config()) == []
    assert configs.config_hash(tiny.config(model__embedding_norm=True)) != base
    assert configs.config_hash(tiny.config(model__num_heads=2)) != base
    assert configs.config_hash(tiny.config(parallel="pmap", mesh__data=4, data__data_dir="/elsewhere")) == base


def test_the_run_id_names_what_was_swept():
    assert configs.run_id(tiny.config(), {"model.num_heads": 4}).startswith("tiny-num_heads=4-")


def test_the_diff_of_two_configs_names_field_and_both_values():
    assert configs.diff(tiny.config(), tiny.config(model__num_heads=2, parallel="pmap")) == ["model.num_heads: 4 -> 2"]


def test_a_config_read_back_from_json_is_the_same_run():
    config = tiny.config("translation", model__num_heads=(2, 4))
    assert configs.config_hash(configs.plain(config)) == configs.config_hash(config)
    assert configs.resolve(configs.plain(config)) == configs.resolve(config)
