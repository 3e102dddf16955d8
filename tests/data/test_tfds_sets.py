"""Stock TFDS sets fed from memory: everything but the download is the real thing."""

import sys
import types

import numpy as np
import pytest
import requests

from mha_jax.data import load
from mha_jax.specs import DataSpec, UserError

PAIRS = [{"en": f"{n} dog", "de": f"{n} Hünd"} for n in range(40)]
RATED = [{"sentence": f"film {n} é" + " long" * (n % 5), "label": n % 2, "idx": n} for n in range(40)]


def _feed(monkeypatch, builder: type, splits: dict[str, list[dict]]) -> None:
    def generators(self, dl_manager):
        return {split: ((n, record) for n, record in enumerate(records)) for split, records in splits.items()}

    monkeypatch.setattr(builder, "_split_generators", generators)


@pytest.fixture
def wmt(monkeypatch):
    from tensorflow_datasets.translate.wmt14 import Wmt14Translate

    _feed(monkeypatch, Wmt14Translate, {"train": PAIRS[:30], "validation": PAIRS[30:35], "test": PAIRS[35:]})


@pytest.fixture
def glue(monkeypatch):
    from tensorflow_datasets.text.glue import Glue

    hidden = [{**record, "label": -1} for record in RATED[35:]]
    _feed(monkeypatch, Glue, {"train": RATED[:30], "validation": RATED[30:35], "test": hidden})


def _spec(name: str, **fields) -> DataSpec:
    return DataSpec("tfds", **{"length": 31, "batch_size": 4, "tfds_name": name, **fields})


@pytest.mark.parametrize(("languages", "word"), [(None, "dog"), (("en", "de"), "Hünd")])
def test_translation_set_in_its_own_order_or_the_one_asked_for(wmt, tmp_path, languages, word):
    data = load(_spec("wmt14_translate/de-en", languages=languages), "translation", tmp_path)
    assert sorted(data.references("test")) == sorted(f"{n} {word}" for n in range(35, 40))
    assert data.fingerprint["source"].startswith("tfds:wmt14_translate/de-en/")
    batch = data.train_batch(0, 0)
    for source, target in zip(batch["source"], batch["targets"], strict=True):
        assert data.tokenizer.decode(source).split()[0] == data.tokenizer.decode(target).split()[0]


def test_classification_set_keeps_labels_with_texts_and_leaves_out_hidden_ones(glue, tmp_path):
    data = load(_spec("glue/sst2", num_classes=2), "classification", tmp_path)
    assert data.splits == ("validation",)
    rows = 0
    for batch in [*data.eval_batches("validation"), *(data.train_batch(0, step) for step in range(9))]:
        for inputs, length, label, weight in zip(
            batch["inputs"], batch["lengths"], batch["labels"], batch["weights"], strict=True
        ):
            assert int(data.tokenizer.decode(inputs).split()[1]) % 2 == label
            assert (inputs[:length] != 0).all() and (inputs[length:] == 0).all()
            rows += weight
    assert rows == 5 + 9 * 4


def test_long_texts_are_cut_in_classification(glue, tmp_path):
    data = load(_spec("glue/sst2", num_classes=2, length=13), "classification", tmp_path)
    assert data.fingerprint["splits"]["train"]["truncated"] == 24
    assert {int(n) for step in range(20) for n in data.train_batch(0, step)["lengths"]} <= set(range(10, 14))


def test_text_set_for_language_models(monkeypatch, tmp_path):
    import tensorflow_datasets as tfds

    lm1b = tfds.builder_cls("lm1b")
    _feed(monkeypatch, lm1b, {"train": [{"text": f"{n} words é"} for n in range(60)], "test": [{"text": "last"}]})
    data = load(_spec("lm1b", validation_fraction=0.1), "lm", tmp_path)
    counts = {split: facts["examples"] for split, facts in data.fingerprint["splits"].items()}
    assert counts == {"train": 54, "validation": 6, "test": 1}
    (batch,) = data.eval_batches("test")
    assert data.tokenizer.decode(batch["targets"][0]) == "last"


def test_prepared_set_is_used_again_without_tfds(wmt, tmp_path, monkeypatch):
    spec = _spec("wmt14_translate/de-en")
    first = load(spec, "translation", tmp_path).train_batch(0, 0)
    monkeypatch.setitem(sys.modules, "mha_jax.data.tfds_sets", types.ModuleType("gone"))
    np.testing.assert_array_equal(load(spec, "translation", tmp_path).train_batch(0, 0)["source"], first["source"])


@pytest.mark.parametrize(
    ("task", "name", "fields", "fault"),
    [
        ("lm", "lm1c", {}, "'lm1c' is not known to TFDS; nearest are lm1b"),
        ("classification", "glue/sst3", {"num_classes": 2}, "'glue' has no config 'sst3'; nearest are sst2"),
        ("lm", "lm1b:9.9.9", {}, "cannot be loaded at version 9.9.9"),
        ("lm", "wmt14_translate/de-en", {}, "does not fit task='lm'"),
        ("translation", "glue/sst2", {}, "no translation set"),
        ("classification", "glue/stsb", {"num_classes": 2}, "texts and one class label"),
        ("classification", "glue/sst2", {"num_classes": 3}, "data.num_classes=3; 'glue/sst2' has 2"),
        ("translation", "wmt14_translate/de-en", {"languages": ("en", "fr")}, "'fr'; .* has 'de' and 'en'"),
        ("classification", "super_glue/boolq", {"num_classes": 2}, "without TensorFlow: pip install tensorflow"),
    ],
)
def test_names_and_features_that_do_not_fit_are_refused_before_any_download(tmp_path, task, name, fields, fault):
    with pytest.raises(UserError, match=fault) as error:
        load(_spec(name, **fields), task, tmp_path)
    assert "\n" not in str(error.value)


def test_no_network_is_said_in_one_line_without_retries(monkeypatch, tmp_path, capfd):
    attempts = []

    def refuse(self, request, **kwargs):
        attempts.append(request.url)
        raise requests.exceptions.ConnectionError("unreachable")

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", refuse)
    with pytest.raises(UserError, match=r"'glue/sst2' cannot be downloaded \(no network\)") as error:
        load(_spec("glue/sst2", num_classes=2), "classification", tmp_path)
    assert len(attempts) == 1 and "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_retries_of_a_download_are_switched_off():
    from tensorflow_datasets.core.download import downloader

    from mha_jax.data import tfds_sets

    class Builder:
        def download_and_prepare(self):
            assert downloader.MAX_RETRIES == 0

    tfds_sets._prepare(Builder(), "any")
