import pytest

from mha_jax.data import embedded, load
from mha_jax.specs import DataSpec


@pytest.mark.slow
def test_corpus_is_large_its_documents_distinct_and_each_in_its_split(monkeypatch, tmp_path):
    splits = embedded.documents()
    texts = [text for split in splits.values() for text in split]
    assert len(set(texts)) == len(texts)
    assert sum(map(len, texts)) > 1_000_000
    assert 0.02 < len(splits["validation"]) / len(texts) < 0.09
    assert 0.02 < len(splits["test"]) / len(texts) < 0.09
    assert any("Return a list of" in text for text in splits["train"])
    monkeypatch.setattr(embedded, "documents", lambda: splits)  # reading them again would take seconds
    data = load(DataSpec("embedded", length=64, batch_size=3, max_examples=200), "lm", tmp_path)
    kept = splits | {"train": splits["train"][:200]}
    facts = data.fingerprint["splits"]
    assert {split: facts[split]["examples"] for split in facts} == {split: len(texts) for split, texts in kept.items()}
    (first,) = next(data.eval_batches("validation"))["targets"][:1]
    assert splits["validation"][0].startswith(data.tokenizer.decode(first))


def test_fingerprint_changes_with_the_library(monkeypatch, tmp_path):
    module = tmp_path / "module.py"
    module.write_text('"""Old."""')
    monkeypatch.setattr(embedded, "_modules", lambda: [module])
    before = embedded.fingerprint()
    assert before == embedded.fingerprint()
    module.write_text('"""Newer."""')
    assert embedded.fingerprint() != before


def test_tests_and_installed_packages_are_left_out():
    for path in embedded._modules():
        assert not {"test", "site-packages"}.intersection(path.parts[-3:])


def test_docstrings_are_read_without_importing(tmp_path):
    path = tmp_path / "module.py"
    path.write_text('"""Top."""\nraise RuntimeError\ndef f():\n    """Inner\n    text."""\n')
    assert embedded._docstrings(path) == "Top.\n\nInner\ntext."
    path.write_text("def broken(:\n")
    assert embedded._docstrings(path) == ""


def test_splits_are_the_same_each_time(monkeypatch):
    modules = embedded._modules()[:40]
    monkeypatch.setattr(embedded, "_modules", lambda: modules)
    assert embedded.documents() == embedded.documents()
