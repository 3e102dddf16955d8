"""Token ids on disk: every text of a corpus once encoded, then mapped into memory by each run that asks for it.

A run of a sweep is a process of its own, so opening a set again must not read text, train a tokenizer or import TFDS.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from mha_jax.data import datasets, files, vocabularies
from mha_jax.data.datasets import Corpus, Split
from mha_jax.data.pieces import PieceTokenizer
from mha_jax.data.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer, train_bpe
from mha_jax.data.vocabularies import FileTokenizer
from mha_jax.specs import DataSpec, UserError

_FORMAT = 1  # part of every key: raise it when what is stored changes
FIELDS = {
    "lm": ("text",),
    "masked_lm": ("text",),
    "translation": ("source", "target"),
    "classification": ("text",),
}


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Texts end to end: text i is flat[offsets[i]:offsets[i + 1]], its last token the tokenizer's `end`."""

    flat: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


@dataclasses.dataclass(frozen=True)
class TokenSet:
    """An encoded corpus in a directory. `facts` is what a result's provenance needs to say of it, as JSON."""

    directory: epath.Path
    facts: dict[str, Any]
    tokenizer: Tokenizer

    def tokens(self, split: str, field: str) -> Tokens:
        return Tokens(*(_map(self.directory / f"{split}.{field}.{part}.npy") for part in ("tokens", "offsets")))

    def labels(self, split: str) -> np.ndarray:
        return _map(self.directory / f"{split}.labels.npy")

    def references(self, split: str) -> list[str]:
        return json.loads((self.directory / f"{split}.references.json").read_text())


def _map(path: epath.Path) -> np.ndarray:
    return np.asarray(np.load(os.fspath(path), mmap_mode="r"))


def local(cache_dir: epath.PathLike) -> epath.Path:
    """The cache itself, or ~/.cache/mha_jax for one in the cloud: files that are mapped into memory need a disk."""
    path = os.fspath(cache_dir)
    return epath.Path("~/.cache/mha_jax").expanduser() if "://" in path else epath.Path(os.path.abspath(path))


def open_tokens(spec: DataSpec, task: str, cache_dir: epath.PathLike) -> TokenSet:
    """The encoded corpus of a spec; made first, under a lock, where the cache has not got it.

    Raises: UserError for everything that can be wrong with the source, the files and the vocabulary's size.
    """
    root = local(cache_dir)
    content = datasets.content_key(spec)
    deciding = [_FORMAT, task, content, spec.source, spec.tokenizer, spec.tokens, spec.max_examples]
    deciding += [spec.validation_fraction, spec.num_classes]
    if spec.tokenizer_file:
        own = vocabularies.files_of(spec.tokenizer, spec.tokenizer_file)
        deciding += list(files.digests({"train": own}).values())
    key = hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:16]
    directory = root / "tokens" / key
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _lock(root / "lock"):
            if not directory.exists():  # another process may have made it while this one waited
                corpus = datasets.open_corpus(spec, task, content, root)
                _write(corpus, spec, task, content, directory)
    return TokenSet(directory, json.loads((directory / "facts.json").read_text()), _tokenizer(spec, directory))


def _tokenizer(spec: DataSpec, directory: epath.Path) -> Tokenizer:
    if spec.tokenizer == "bpe":
        return BPETokenizer(directory / "tokenizer.json")
    if spec.tokenizer == "llama2c":
        return PieceTokenizer(directory / "tokenizer.bin", spec.tokens)
    if spec.tokenizer == "bytes":
        return ByteTokenizer()
    return FileTokenizer(spec.tokenizer, directory / "tokenizer.json", spec.tokens)


@contextlib.contextmanager
def _lock(path: epath.Path) -> Iterator[None]:
    import fcntl

    with open(os.fspath(path), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the system lets go of it when the process dies, however it dies
        yield


def _write(corpus: Corpus, spec: DataSpec, task: str, content: dict[str, Any], directory: epath.Path) -> None:
    """Encodes into a directory beside the final one and renames it: what exists is whole."""
    unfinished = epath.Path(tempfile.mkdtemp(prefix=".unfinished-", dir=os.fspath(directory.parent)))
    try:
        if spec.tokenizer == "bpe":
            texts = (text for chunk in corpus.splits["train"].chunks() for example in chunk for text in example.texts)
            train_bpe(texts, spec.tokens, unfinished / "tokenizer.json")
        elif spec.tokenizer == "llama2c":
            epath.Path(str(spec.tokenizer_file)).copy(unfinished / "tokenizer.bin")
        elif spec.tokenizer_file:
            (unfinished / "tokenizer.json").write_text(vocabularies.as_json(spec.tokenizer, spec.tokenizer_file))
        tokenizer = _tokenizer(spec, unfinished)
        digest = hashlib.sha256()
        splits = {
            split: _write_split(examples, split, task, tokenizer, digest, unfinished)
            for split, examples in corpus.splits.items()
        }
        facts = {"source": corpus.name, "sha256": digest.hexdigest(), "splits": splits}
        facts |= {"files": content.get("files", {}), "tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size}
        facts |= {"labels": corpus.labels} if corpus.labels else {}
        if tokenizer.path is not None:
            facts["tokenizer_sha256"] = hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()
        (unfinished / "facts.json").write_text(json.dumps(facts, indent=1))
        unfinished.rename(directory)
    except BaseException:
        shutil.rmtree(os.fspath(unfinished), ignore_errors=True)
        raise


def _write_split(
    examples: Split, split: str, task: str, tokenizer: Tokenizer, digest: Any, directory: epath.Path
) -> dict[str, int]:
    """Encodes one split; the counts of its facts. `bytes` are those that a model predicts: targets in translation."""
    if not len(examples):
        raise UserError(f"the {split} split has no examples")
    fields = FIELDS[task]
    opening = np.asarray([tokenizer.start] if task == "classification" and tokenizer.opens else [], np.int32)
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    ids: dict[str, list[np.ndarray]] = {field: [] for field in fields}
    lengths: dict[str, list[int]] = {field: [] for field in fields}
    labels: list[int] = []
    references: list[str] = []
    num_bytes = 0
    for chunk in examples.chunks():
        labels += [example.label for example in chunk]
        for column, field in enumerate(fields):
            texts = [example.texts[column] for example in chunk]
            encoded = [np.concatenate([opening, one, [tokenizer.end]]) for one in tokenizer.encode(texts)]
            ids[field].append(np.concatenate(encoded).astype(dtype))
            lengths[field] += [len(one) for one in encoded]
        for example in chunk:
            raw = [text.encode() for text in example.texts]
            num_bytes += len(raw[-1])
            digest.update(b"".join(len(text).to_bytes(8, "big") + text for text in raw) + b"%d" % example.label)
        if task == "translation" and split != "train":
            references += [example.texts[-1] for example in chunk]
    for field in fields:
        offsets = np.concatenate([[0], np.cumsum(lengths[field])]).astype(np.int64)
        np.save(os.fspath(directory / f"{split}.{field}.tokens.npy"), np.concatenate(ids[field]))
        np.save(os.fspath(directory / f"{split}.{field}.offsets.npy"), offsets)
    if task == "classification":
        np.save(os.fspath(directory / f"{split}.labels.npy"), np.asarray(labels, np.int32))
    if references:
        (directory / f"{split}.references.json").write_text(json.dumps(references))
    tokens = sum(sum(values) for values in lengths.values())
    return {"examples": len(examples), "tokens": tokens, "bytes": num_bytes}
