"""The raw text of a run: whichever source the config names, as splits of texts and labels.

A set is prepared once, as ArrayRecord under the cache directory, and read from there without TensorFlow.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from mha_jax.data import embedded, files
from mha_jax.specs import DataSpec, UserError


class Example(NamedTuple):
    """One document (lm), a source and its target (translation), or the texts of a labelled example."""

    texts: tuple[str, ...]
    label: int = 0


@dataclasses.dataclass(frozen=True)
class Split(Sequence[Example]):
    """A range of a TFDS data source, decoded as it is read."""

    source: Any
    decode: Callable[[dict[str, Any]], Example]
    rows: range

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return dataclasses.replace(self, rows=self.rows[index])
        return self.decode(self.source[self.rows[index]])

    def chunks(self, size: int = 4096) -> Iterator[list[Example]]:
        """All examples in order; reading many at once is several times faster than one by one."""
        for start in range(0, len(self), size):
            records = self.source.__getitems__(list(self.rows[start : start + size]))
            yield [self.decode(record) for record in records]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """`name` says what it is; `splits` holds "train" and those of "validation" and "test" that exist.

    `labels` are the names of the classes, where files name them.
    """

    name: str
    splits: dict[str, Split]
    labels: tuple[str, ...] = ()


def content_key(spec: DataSpec) -> dict[str, Any]:
    """What decides the raw text, known without preparing it: for files, their sha256 by path."""
    if spec.source == "embedded":
        return {"standard_library": embedded.fingerprint()}
    if spec.source == "tfds":
        return {"tfds_name": spec.tfds_name, "languages": spec.languages}
    return {"files": files.digests(spec.files or {})}


def open_corpus(spec: DataSpec, task: str, key: dict[str, Any], cache_dir: epath.Path) -> Corpus:
    """Prepares the set where the cache has not got it, and opens it. `key` is `content_key(spec)`.

    Raises: UserError for a source that does not fit the task, and for every fault of the files or of the TFDS set.
    """
    if spec.source == "tfds":
        from mha_jax.data import tfds_sets

        corpus = tfds_sets.open_named(spec, task, cache_dir)
    else:
        corpus = _open_own(spec, hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16], cache_dir)
    splits = _with_held_out(corpus.splits, spec.validation_fraction)
    if spec.max_examples is not None:
        splits["train"] = splits["train"][: spec.max_examples]
    return dataclasses.replace(corpus, splits=splits)


def _open_own(spec: DataSpec, key: str, cache_dir: epath.Path) -> Corpus:
    import tensorflow_datasets as tfds

    from mha_jax.data import builders

    tfds.disable_progress_bar()
    place: dict[str, Any] = {"data_dir": cache_dir / "prepared" / key, "file_format": "array_record"}
    builder: Any  # TFDS hides the signatures of a builder from type checkers
    if spec.source == "embedded":
        builder = builders.EmbeddedCorpus(**place)
    elif spec.source == "text":
        builder = builders.TextFiles(paths=spec.files or {}, **place)
    elif spec.source == "labelled":
        builder = builders.LabelledFiles(paths=spec.files or {}, **place)
        if len(builder.labels) != spec.num_classes:
            names = ", ".join(builder.labels)
            raise UserError(
                f"data.num_classes={spec.num_classes}; data.files.train has {len(builder.labels)} labels: {names}"
            )
    else:
        builder = builders.ParallelFiles(paths=spec.files or {}, **place)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS reports what it does with print
        builder.download_and_prepare()
    fields = ("source", "target") if spec.source == "parallel" else ("text",)

    def decode(record: dict[str, Any]) -> Example:
        return Example(tuple(record[field].decode() for field in fields), int(record.get("label", 0)))

    sources = {split: builder.as_data_source(split=split) for split in files.SPLITS if split in builder.info.splits}
    splits = {split: Split(source, decode, range(len(source))) for split, source in sources.items()}
    return Corpus(spec.source, splits, builder.labels if spec.source == "labelled" else ())


def _with_held_out(splits: dict[str, Split], fraction: float) -> dict[str, Split]:
    """Cuts validation, and test where neither exists, off the end of train: `fraction` of it for each."""
    missing = [split for split in ("test", "validation") if split not in splits]
    if "validation" not in missing:
        return dict(splits)
    train = splits["train"]
    count = max(round(fraction * len(train)), 1)
    if len(train) <= count * len(missing):
        raise UserError(
            f"{len(train)} training examples are too few to hold out data.validation_fraction={fraction} of them"
        )
    found = dict(splits)
    for split in missing:
        found[split], train = train[len(train) - count :], train[: len(train) - count]
    return {"train": train} | {split: found[split] for split in ("validation", "test") if split in found}
