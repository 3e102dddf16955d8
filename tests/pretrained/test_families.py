"""BERT, GPT-2 and llama from safetensors: layer by layer against NumPy, there and back, files that do not fit."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mha_jax.pretrained import directory, families
from mha_jax.pretrained.agreement import agreement
from mha_jax.specs import HeadShape, UserError
from tests.pretrained import checkpoints

# Measured: at most 2e-6 where logits reach 4. An epsilon of 1e-6 for 1e-3 is more than 1e-4 off.
TOLERANCE = 1e-5
SLOW = pytest.mark.slow
KINDS = tuple(checkpoints.CONFIGS)
ROWS = [np.random.default_rng(1).integers(0, 97, length) for length in (17, 9)]


@pytest.mark.parametrize(
    "kind", ["bert", "gpt2", *(pytest.param(k, marks=SLOW) for k in ("bert_classifier", "llama_untied"))]
)
def test_every_layer_is_that_of_the_forward_pass_in_float64(tmp_path: Path, kind: str):
    found = families.read(checkpoints.checkpoint(tmp_path / kind, kind))
    report = agreement(found, checkpoints.model_of(found), ROWS)
    assert len(report["layers"]) == 3 and report["tokens"] == 26
    assert max(*report["layers"], report["logits"]) < TOLERANCE
    assert min(*report["largest"], report["largest_logit"]) > 0.1


@pytest.mark.slow
def test_another_epsilon_would_be_seen(tmp_path: Path):
    found = families.read(checkpoints.checkpoint(tmp_path / "a", "bert"))
    other = families.read(checkpoints.checkpoint(tmp_path / "b", "bert", layer_norm_eps=1e-6))
    assert agreement(found, checkpoints.model_of(other), ROWS)["logits"] > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_was_read(tmp_path: Path, kind: str):
    folder = checkpoints.checkpoint(tmp_path / kind, kind)
    found = families.read(folder)
    config, tensors = families.written(checkpoints.run_of(found), found.params)
    original = load_file(folder / "model.safetensors")
    assert tensors.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(tensors[name], tensor, err_msg=name)
    assert "mha_jax" not in config
    directory.write(tmp_path / "out", config, tensors)
    assert families.read(tmp_path / "out").model == found.model


@pytest.mark.slow
def test_layers_of_several_sizes_and_without_heads_come_back_by_the_head_map(tmp_path: Path):
    shapes = [HeadShape(3, 2, 4, 4, (0, 1, 1)), HeadShape(0, 0, 4, 4)]
    maps = {"mha_jax": {"heads": [shape.__dict__ for shape in shapes]}}
    found = families.read(checkpoints.checkpoint(tmp_path / "llama", "llama", **maps))
    run = checkpoints.run_of(found)
    assert list(run.model.heads("decoder")) == shapes
    assert max(agreement(found, checkpoints.model_of(found), ROWS)["layers"]) < TOLERANCE
    directory.write(tmp_path / "out", *families.written(run, found.params))
    again = families.read(tmp_path / "out")
    assert again.model == found.model
    jax.tree.map(np.testing.assert_array_equal, again.params, found.params)


def test_names_and_tables_of_old_files_are_understood(tmp_path: Path):
    folder = checkpoints.checkpoint(tmp_path / "bert", "bert")
    plain, tensors = families.read(folder), load_file(folder / "model.safetensors")
    old = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x for name, x in tensors.items()
    }
    old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    old["bert.pooler.dense.weight"] = np.ones((12, 12), np.float32)
    old["bert.embeddings.position_ids"] = np.arange(19)
    save_file(old, folder / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, families.read(folder).params, plain.params)
    folder = checkpoints.checkpoint(tmp_path / "gpt2", "gpt2")
    plain, tensors = families.read(folder), load_file(folder / "model.safetensors")
    old = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    save_file(old | {"h.0.attn.bias": np.ones((1, 1, 19, 19), np.float32)}, folder / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, families.read(folder).params, plain.params)


def test_a_llama_that_does_not_say_its_rotary_base_has_the_first_ones(tmp_path: Path):
    folder = checkpoints.checkpoint(tmp_path / "llama", "llama", rope_theta=500.0)
    config = json.loads((folder / "config.json").read_text())
    assert families.read(folder).model["rope_base"] == config.pop("rope_theta") == 500.0
    (folder / "config.json").write_text(json.dumps(config))
    assert families.read(folder).model["rope_base"] == 10_000.0


def test_shards_and_16_bits_are_read(tmp_path: Path):
    folder = checkpoints.checkpoint(tmp_path / "gpt2", "gpt2")
    rounded = {name: x.astype(ml_dtypes.bfloat16) for name, x in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    shards = {"a.safetensors": sorted(rounded)[:5], "b.safetensors": sorted(rounded)[5:]}
    for shard, names in shards.items():
        save_file({name: rounded[name] for name in names}, folder / shard)
    places = {name: shard for shard, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    read = directory.read_tensors(folder)
    assert read.keys() == rounded.keys()
    for name, tensor in read.items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, rounded[name].astype(np.float32))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places | {"more": "a.safetensors"}}))
    with pytest.raises(UserError, match=r"a.safetensors does not hold what .* says: more"):
        directory.read_tensors(folder)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_an_encoder_or_decoder_without_a_head_keeps_its_layers_and_says_what_was_put_there(tmp_path: Path, kind: str):
    whole = families.read(checkpoints.checkpoint(tmp_path / "whole", kind))
    found = families.read(checkpoints.headless(tmp_path / "headless", kind))
    (note,) = found.notes
    assert whole.notes == () and ("no head" in note or "no output table" in note)
    assert (found.task, found.model) == (whole.task, whole.model)
    for part in whole.params.keys() - {"head"}:
        jax.tree.map(np.testing.assert_array_equal, found.params[part], whole.params[part])
    for theirs, ours in zip(whole.hidden_states(ROWS[1])[:-1], found.hidden_states(ROWS[1])[:-1], strict=True):
        np.testing.assert_array_equal(theirs, ours)


def test_heads_of_other_tasks_are_left_out_and_named(tmp_path: Path):
    folder = checkpoints.headless(tmp_path / "bert", "bert")
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["BertForTokenClassification"]}
    (folder / "config.json").write_text(json.dumps(config))
    _edit(folder, lambda tensors: tensors.update({"classifier.bias": np.ones(5, np.float32)}))
    (note,) = families.read(folder).notes
    assert note.endswith("left out: classifier.bias")
    _edit(folder, lambda tensors: tensors.pop("encoder.layer.0.output.dense.bias"))
    with pytest.raises(UserError, match=r"missing: bert\.encoder\.layer\.0\.output\.dense\.bias"):
        families.read(folder)


def test_classes_stand_in_the_order_of_the_labels_of_the_data(tmp_path: Path):
    names = {"0": "LABEL_2", "1": "No", "2": "YES"}
    found = families.read(checkpoints.checkpoint(tmp_path / "bert", "bert_classifier", id2label=names))
    assert found.labels == ("LABEL_2", "No", "YES")
    ours = families.relabelled(found, ("2", "YES", "no"))
    logits, own = found.hidden_states(ROWS[0])[-1], ours.hidden_states(ROWS[0])[-1]
    np.testing.assert_allclose(own, logits[[0, 2, 1]], rtol=0, atol=1e-14)  # float64, summed in another order
    np.testing.assert_array_equal(ours.params["classes"]["bias"], found.params["classes"]["bias"][[0, 2, 1]])
    assert ours.notes == () and families.written(checkpoints.run_of(ours), ours.params, ours.labels)[0]["id2label"] == {
        "0": "2",
        "1": "YES",
        "2": "no",
    }
    other = families.relabelled(found, ("bad", "good", "so-so"))
    assert other.notes[0].endswith("'bad' for 'LABEL_2', 'good' for 'No', 'so-so' for 'YES'")
    np.testing.assert_array_equal(other.params["classes"]["bias"], found.params["classes"]["bias"])


def _edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gpt2", lambda w: w.pop("transformer.ln_f.bias"), r"missing: transformer\.ln_f\.bias"),
        ("bert", lambda w: w.update({"bert.more": np.ones(1)}), r"not known: bert\.more"),
        ("gpt2", lambda w: w.update({"transformer.ln_f.bias": np.ones(3)}), r"ln_f\.bias is \[3\]; .* it is \[12\]"),
        ("llama", lambda w: w.update({"lm_head.weight": np.ones((97, 24))}), r"lm_head\.weight of its own"),
        ("bert", lambda w: w.update({"cls.predictions.bias": np.full(97, np.nan)}), "numbers that are not finite"),
    ],
    ids=["missing", "extra", "shape", "untied", "not finite"],
)
def test_tensors_that_do_not_fit_are_one_line(tmp_path: Path, kind: str, change, message: str):
    folder = checkpoints.checkpoint(tmp_path / kind, kind)
    _edit(folder, change)
    with pytest.raises(UserError, match=message) as caught:
        families.read(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("bert", {"hidden_act": "mish"}, "hidden_act='mish' cannot be built"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ("bert", {"architectures": ["BertLMHeadModel"]}, "architectures='BertLMHeadModel' cannot be imported; BertFor"),
        ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings=False cannot be built; True can"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "rotary positions of type 'llama3'"),
        ("llama", {"mha_jax": {"heads": []}}, "mha_jax.heads lists 0 layers; the model has 2"),
        ("gpt2", {"model_type": "t5"}, "model_type='t5' of config.json is not known; bert, gpt2, llama are"),
    ],
)
def test_a_config_that_asks_for_something_else_is_one_line(tmp_path: Path, kind: str, changes: dict, message: str):
    folder = checkpoints.checkpoint(tmp_path / kind, kind)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        families.read(folder)


def test_files_that_are_none_are_one_line(tmp_path: Path):
    folder = checkpoints.checkpoint(tmp_path / "gpt2", "gpt2")
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:-40])
    with pytest.raises(UserError, match="is no whole safetensors file"):
        families.read(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="only safetensors files are read"):
        families.read(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        families.read(folder)
