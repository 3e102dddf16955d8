import dataclasses
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from mha_jax.data import datasets, tokenised
from mha_jax.data.tokenised import local, open_tokens
from mha_jax.specs import EOS, UserError


def test_texts_lie_end_to_end_and_each_ends_in_eos(parallel_spec, tmp_path):
    tokens = open_tokens(parallel_spec, "translation", tmp_path).tokens("validation", "source")
    assert tokens.offsets[0] == 0 and tokens.offsets[-1] == len(tokens.flat)
    np.testing.assert_array_equal(tokens.flat[tokens.offsets[1:] - 1], EOS)
    assert (tokens.flat == EOS).sum() == len(tokens.lengths) == 11


def test_facts_are_json_and_count_what_was_read(parallel_spec, tmp_path):
    facts = open_tokens(parallel_spec, "translation", tmp_path).facts
    targets = {split: Path(paths[1]).read_bytes() for split, paths in parallel_spec.files.items()}
    assert json.loads(json.dumps(facts)) == facts
    assert list(facts["splits"]) == ["train", "validation", "test"]
    for split, text in targets.items():
        assert facts["splits"][split]["bytes"] == len(text.replace(b"\n", b""))
        assert facts["splits"][split]["examples"] == text.count(b"\n")
    assert (facts["tokenizer"], facts["vocab_size"]) == ("bytes", 260)
    assert facts["files"].keys() == {path for paths in parallel_spec.files.values() for path in paths}


def test_changed_file_is_read_again_and_has_another_sha256(text_spec, tmp_path):
    before = open_tokens(text_spec, "lm", tmp_path / "cache").facts
    path = text_spec.files["train"]
    with open(path, "a") as file:
        file.write("\n\none more")
    after = open_tokens(text_spec, "lm", tmp_path / "cache").facts
    assert after["sha256"] != before["sha256"]
    assert after["splits"]["test"] != before["splits"]["test"]


def test_second_opening_does_not_read_the_corpus(text_spec, tmp_path, monkeypatch):
    first = open_tokens(text_spec, "lm", tmp_path / "cache")
    monkeypatch.setattr(datasets, "open_corpus", None)
    second = open_tokens(text_spec, "lm", tmp_path / "cache")
    assert second.directory == first.directory and second.facts == first.facts


def test_bpe_is_trained_on_the_training_split_of_both_languages(parallel_spec, tmp_path):
    spec = dataclasses.replace(parallel_spec, tokenizer="bpe", vocab_size=290)
    for split in ("validation", "test"):
        source, target = map(Path, spec.files[split])
        target.write_text(source.read_text().replace("red", "zzzz"))
    tokens = open_tokens(spec, "translation", tmp_path / "cache")
    vocabulary = json.loads(tokens.tokenizer.path.read_text())["model"]["vocab"]
    assert {"Ġdog", "Ġrot"} <= vocabulary.keys() and "zz" not in vocabulary
    assert tokens.facts["tokenizer_sha256"] and tokens.facts["vocab_size"] == 290


def test_failed_preparation_leaves_nothing_that_looks_whole(parallel_spec, tmp_path):
    spec = dataclasses.replace(parallel_spec, tokenizer="bpe", vocab_size=9999)
    for _ in range(2):
        with pytest.raises(UserError, match=r"data\.vocab_size=9999"):
            open_tokens(spec, "translation", tmp_path / "cache")
        assert list((tmp_path / "cache/tokens").iterdir()) == []


def test_a_split_without_examples_is_refused(text_spec, tmp_path, monkeypatch):
    nothing = datasets.Split(source=[], decode=lambda record: record, rows=range(0))
    monkeypatch.setattr(datasets, "open_corpus", lambda *_: datasets.Corpus("text", {"train": nothing}))
    with pytest.raises(UserError, match="train split has no examples"):
        open_tokens(text_spec, "lm", tmp_path / "cache")
    assert list((tmp_path / "cache/tokens").iterdir()) == []


def _open(spec, cache, queue):
    queue.put(open_tokens(spec, "lm", cache).facts["sha256"])


@pytest.mark.slow
def test_two_processes_preparing_at_once_agree(text_spec, tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_open, args=(text_spec, str(tmp_path / "cache"), queue)) for _ in range(2)]
    for process in processes:
        process.start()
    found = {queue.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert found == {open_tokens(text_spec, "lm", tmp_path / "cache").facts["sha256"]}
    assert len(list((tmp_path / "cache/tokens").iterdir())) == 1


def test_a_cloud_cache_is_mirrored_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local("gs://bucket/run/.cache/data") == tmp_path / ".cache/mha_jax"
    assert local(tmp_path / "x") == tmp_path / "x"
    assert tokenised.FIELDS["translation"] == ("source", "target")
