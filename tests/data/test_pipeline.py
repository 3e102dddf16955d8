import dataclasses
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mha_jax.data import batch_shapes, load
from mha_jax.specs import BOS, EOS, PAD, DataSpec, UserError
from tests.data.conftest import PAIRS


def _same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def _shapes(batch):
    return {name: (value.shape, value.dtype) for name, value in batch.items()}


def test_batches_are_functions_of_seed_and_step(parallel_spec, tmp_path):
    first, second = (load(parallel_spec, "translation", tmp_path / "cache") for _ in range(2))
    batches = {(seed, step): first.train_batch(seed, step) for seed in (0, 3) for step in range(30)}
    for seed, step in [(3, 29), (0, 7), (3, 0), (0, 29)]:
        _same(second.train_batch(seed, step), batches[seed, step])
    for step in range(30):
        assert _shapes(batches[0, step]) == _shapes(batches[3, step])


@pytest.mark.parametrize("segments", [False, True])
def test_lm_shapes_are_known_without_data(text_spec, tmp_path, segments):
    spec = dataclasses.replace(text_spec, segments=segments)
    (shapes,) = batch_shapes(spec, "lm")
    assert _shapes(load(spec, "lm", tmp_path / "cache").train_batch(0, 0)) == _shapes(shapes)


@pytest.mark.parametrize("batch_tokens", [None, 500])
def test_translation_shapes_are_known_without_data(parallel_spec, tmp_path, batch_tokens):
    spec = dataclasses.replace(parallel_spec, batch_tokens=batch_tokens)
    data = load(spec, "translation", tmp_path / "cache")
    known = [_shapes(shape) for shape in batch_shapes(spec, "translation")]
    found = [_shapes(data.train_batch(0, step)) for step in range(40)]
    assert all(shape in known for shape in found) and all(shape in found for shape in known)
    rows = [shape["row"].shape[0] for shape in batch_shapes(spec, "translation")]
    assert rows == ([5, 5, 5] if batch_tokens is None else [16, 8, 8])


def test_language_model_batches_are_the_text_shifted_by_one(text_spec, tmp_path):
    data = load(text_spec, "lm", tmp_path / "cache")
    stream = np.concatenate([b["targets"][b["weights"] == 1] for b in data.eval_batches("validation")])
    inputs = np.concatenate([b["inputs"][b["weights"] == 1] for b in data.eval_batches("validation")])
    assert inputs[0] == BOS and stream[-1] == EOS
    np.testing.assert_array_equal(inputs[1:], stream[:-1])
    assert len(stream) == data.fingerprint["splits"]["validation"]["tokens"]
    assert len(stream) - (stream == EOS).sum() == data.num_bytes("validation")
    for step in range(50):
        batch = data.train_batch(0, step)
        np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
        assert batch["weights"].min() == 1
        np.testing.assert_array_equal(batch["row"], np.arange(3))


def test_held_out_documents_are_the_end_of_the_training_file(text_spec, tmp_path):
    data = load(dataclasses.replace(text_spec, validation_fraction=0.1), "lm", tmp_path / "cache")
    assert {s: facts["examples"] for s, facts in data.fingerprint["splits"].items()} == {
        "train": 81,
        "validation": 10,
        "test": 10,
    }
    assert data.splits == ("validation", "test")
    targets = np.concatenate([b["targets"][b["weights"] == 1] for b in data.eval_batches("test")])
    assert data.tokenizer.decode(targets).startswith("9192 cat93 ant")


def test_segments_number_the_texts_of_a_window(text_spec, tmp_path):
    batch = load(dataclasses.replace(text_spec, segments=True), "lm", tmp_path / "cache").train_batch(0, 0)
    expected = np.zeros_like(batch["inputs"])
    for row, tokens in enumerate(batch["inputs"]):
        count = 0
        for place, token in enumerate(tokens):
            count += token == EOS
            expected[row, place] = count
    assert expected.max() > 0
    np.testing.assert_array_equal(batch["segments"], expected)


def test_translation_pairs_stay_together_with_bos_before_and_eos_behind(parallel_spec, tmp_path):
    data = load(parallel_spec, "translation", tmp_path / "cache")
    decode = data.tokenizer.decode
    for step in range(20):
        batch = data.train_batch(1, step)
        for row in range(5):
            size, length = int(batch["weights"][row].sum()), int(batch["source_lengths"][row])
            targets, inputs, source = batch["targets"][row], batch["target_inputs"][row], batch["source"][row]
            assert decode(source).split()[0] == decode(targets).split()[0]
            assert source[length - 1] == EOS and (source[length:] == PAD).all() and (source[:length] != PAD).all()
            assert targets[size - 1] == EOS and (targets[size:] == PAD).all() and (inputs[size:] == PAD).all()
            assert inputs[0] == BOS
            np.testing.assert_array_equal(inputs[1:size], targets[: size - 1])


def test_evaluation_sees_every_pair_once_and_index_restores_the_order(parallel_spec, tmp_path):
    data = load(parallel_spec, "translation", tmp_path / "cache")
    known = [_shapes(shape) for shape in batch_shapes(parallel_spec, "translation")]
    for split in ("validation", "test"):
        decoded: dict[int, str] = {}
        for batch in data.eval_batches(split):
            index = batch.pop("index")
            assert _shapes(batch) in known
            for row, place in enumerate(index):
                if place < 0:
                    assert not batch["weights"][row].any()
                    assert batch["source_lengths"][row] > 0
                else:
                    assert place not in decoded
                    decoded[int(place)] = data.tokenizer.decode(batch["targets"][row])
        assert [decoded[place] for place in range(PAIRS[split])] == data.references(split)


def test_long_pairs_are_dropped_in_training_and_cut_in_evaluation_and_both_are_counted(parallel_spec, tmp_path):
    whole = load(parallel_spec, "translation", tmp_path / "cache")
    sizes = {split: whole._batches.lengths(split) for split in PAIRS}
    length = int(np.unique(sizes["validation"])[-3])  # a pair of exactly this length fits
    data = load(dataclasses.replace(parallel_spec, length=length, buckets=None), "translation", tmp_path / "cache")
    facts = data.fingerprint["splits"]
    assert facts["train"]["dropped"] == (sizes["train"] > length).sum() > 0
    assert facts["validation"]["truncated"] == (sizes["validation"] > length).sum() == 2
    seen = {tuple(row) for step in range(40) for row in data.train_batch(0, step)["targets"]}
    assert len(seen) == (sizes["train"] <= length).sum()
    batches = list(data.eval_batches("validation"))
    assert sum((b["index"] >= 0).sum() for b in batches) == PAIRS["validation"]
    ends = [row[row != PAD][-1] for b in batches for row in b["targets"]]
    assert all(end == EOS for end in ends) and {b["targets"].shape[1] for b in batches} == {length}
    assert data.references("validation") == whole.references("validation")


def test_stream_is_the_batches_of_all_seeds_stacked(parallel_spec, tmp_path):
    data = load(parallel_spec, "translation", tmp_path / "cache")
    stream = data.train_stream((0, 4), start=3)
    for step in range(3, 15):
        batch = next(stream)
        for row, seed in enumerate((0, 4)):
            _same({name: value[row] for name, value in batch.items()}, data.train_batch(seed, step))


def test_max_examples_limits_training_only(parallel_spec, tmp_path):
    data = load(dataclasses.replace(parallel_spec, max_examples=19), "translation", tmp_path / "cache")
    counts = {split: facts["examples"] for split, facts in data.fingerprint["splits"].items()}
    assert counts == {"train": 19, "validation": 11, "test": 7}


@pytest.mark.parametrize(
    ("task", "change", "fault"),
    [
        ("translation", {"source": "embedded"}, "task='translation' cannot be trained on data.source='embedded'"),
        ("lm", {"source": "parallel"}, "task='lm' cannot be trained on data.source='parallel'"),
        ("classification", {"source": "text"}, "'labelled' or 'tfds' fit"),
        ("lm", {"source": "labelled"}, "task='lm' cannot be trained on data.source='labelled'"),
        ("lm", {"buckets": (7, 17)}, "no use with task='lm'"),
        ("lm", {"languages": ("en", "de")}, "is for data.source='tfds'"),
        ("lm", {"length": 99999}, "shorter than data.length=99999"),
    ],
)
def test_what_does_not_go_together_is_refused(text_spec, tmp_path, task, change, fault):
    with pytest.raises(UserError, match=fault):
        load(dataclasses.replace(text_spec, **change), task, tmp_path / "cache")


def test_labelled_lines_become_texts_with_the_numbers_of_their_labels(tmp_path):
    names = ("dog", "ant", "cat")
    (tmp_path / "train.tsv").write_text("".join(f"{names[n % 3]}\t{n} is {names[n % 3]}\n" for n in range(60)))
    spec = DataSpec("labelled", 16, 4, files={"train": str(tmp_path / "train.tsv")}, num_classes=3)
    data = load(spec, "classification", tmp_path / "cache")
    assert data.fingerprint["labels"] == ["ant", "cat", "dog"]
    assert {split: facts["examples"] for split, facts in data.fingerprint["splits"].items()} == {
        "train": 54,
        "validation": 3,
        "test": 3,
    }
    (shapes,) = batch_shapes(spec, "classification")
    for batch in (data.train_batch(0, 0), *data.eval_batches("test")):
        assert _shapes(batch) == _shapes(shapes)
        for ids, label in zip(batch["inputs"], batch["labels"], strict=True):
            assert data.tokenizer.decode(ids).endswith(f"is {data.fingerprint['labels'][label]}")
    with pytest.raises(UserError, match=r"data\.num_classes=2; data\.files\.train has 3 labels: ant, cat, dog"):
        load(dataclasses.replace(spec, num_classes=2), "classification", tmp_path / "cache")


def test_pairs_that_are_all_too_long_are_refused(tmp_path):
    (tmp_path / "lines").write_text("six letters\n" * 5)
    pair = (str(tmp_path / "lines"),) * 2
    spec = DataSpec("parallel", length=7, batch_size=2, files={"train": pair, "validation": pair})
    with pytest.raises(UserError, match=r"longer than data\.length=7"):
        load(spec, "translation", tmp_path / "cache")


@pytest.mark.slow
def test_multi30k_is_read_in_buckets(tmp_path, multi30k):
    names = {"train": "train", "validation": "val", "test": "test_2016_flickr"}
    files = {split: (str(multi30k / f"{n}.en.gz"), str(multi30k / f"{n}.de.gz")) for split, n in names.items()}
    spec = DataSpec(
        "parallel", 64, 64, "bpe", 1000, files=files, batch_tokens=2048, buckets=(16, 32, 64), max_examples=2000
    )
    data = load(spec, "translation", tmp_path / "cache")
    assert {split: facts["examples"] for split, facts in data.fingerprint["splits"].items()} == {
        "train": 2000,
        "validation": 1014,
        "test": 1000,
    }
    assert data.references("test")[0] == "Ein Mann mit einem orangefarbenen Hut, der etwas anstarrt."
    start = time.perf_counter()
    for step in range(100):
        data.train_batch(0, step)
    assert (time.perf_counter() - start) / 100 < 0.005  # 0.3 ms on an idle machine
    start = time.perf_counter()
    load(spec, "translation", tmp_path / "cache")
    assert time.perf_counter() - start < 1


def test_opening_a_prepared_set_imports_neither_tfds_nor_tensorflow(text_spec, tmp_path):
    load(text_spec, "lm", tmp_path / "cache")
    code = (
        "import sys; from mha_jax.data import load; from mha_jax.specs import DataSpec\n"
        f"load({text_spec!r}, 'lm', {str(tmp_path / 'cache')!r}).train_batch(0, 0)\n"
        "assert not {'tensorflow_datasets', 'tensorflow', 'grain'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_batches_enter_jit_as_they_are(text_spec, tmp_path):
    batch = load(text_spec, "lm", tmp_path / "cache").train_batch(0, 0)
    assert float(jax.jit(lambda b: b["weights"].sum())(batch)) == 3 * 17
