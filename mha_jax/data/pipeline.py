"""Batches of a run: `load` opens the data of a spec, and batch = f(seed, step).

Nothing is remembered between calls: a resumed run, another device count or another process gets the same batches.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from mha_jax.data.batches import Batch, Batches, ClassificationBatches, LMBatches, MaskedBatches, TranslationBatches
from mha_jax.data.masking import Masking
from mha_jax.data.schedule import Schedule
from mha_jax.data.tokenised import TokenSet, open_tokens
from mha_jax.data.tokenizers import Tokenizer
from mha_jax.specs import DataSpec, UserError

_ROWS_MULTIPLE = 8  # so that batches counted in tokens divide over the devices of one host
_SOURCES = {
    "lm": ("embedded", "text", "tfds"),
    "masked_lm": ("embedded", "text", "tfds"),
    "translation": ("parallel", "tfds"),
    "classification": ("labelled", "tfds"),
}


_STREAMS = ("lm", "masked_lm")  # tasks whose rows are cut out of one stream of texts


def _buckets(spec: DataSpec, task: str) -> list[tuple[int, int]]:
    """(columns, rows) of every batch shape, short to long."""
    if spec.source not in _SOURCES[task]:
        raise UserError(
            f"task={task!r} cannot be trained on data.source={spec.source!r}; "
            f"{' or '.join(map(repr, _SOURCES[task]))} fit"
        )
    if spec.languages and spec.source != "tfds":
        raise UserError(
            f"data.languages={spec.languages} is for data.source='tfds'; data.files names source, then target"
        )
    if task in _STREAMS and spec.buckets:
        raise UserError(
            f"data.buckets={spec.buckets} is of no use with task={task!r}, whose rows are all data.length long"
        )
    if task != "lm" and spec.segments:
        raise UserError(f"data.segments=True is for task='lm', not {task!r}")
    lengths = spec.buckets or (spec.length,)
    if spec.batch_tokens is None:
        return [(length, spec.batch_size) for length in lengths]
    tokens = spec.batch_tokens
    return [(length, max(tokens // length // _ROWS_MULTIPLE, 1) * _ROWS_MULTIPLE) for length in lengths]


def batch_shapes(spec: DataSpec, task: str) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """The training batches as shapes, one entry a bucket, short to long; no data is touched.

    Raises: UserError where source, buckets and task do not go together.
    """

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.int32)

    def of(length: int, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        grid, column = ints(rows, length), ints(rows)
        weights = jax.ShapeDtypeStruct((rows,) if task == "classification" else (rows, length), np.float32)
        shared = {"weights": weights, "row": column}
        if task == "masked_lm":
            return {"inputs": grid, "targets": grid, "lengths": column, **shared}
        if task == "lm":
            segments = {"segments": grid} if spec.segments else {}
            return {"inputs": grid, "targets": grid, **segments, **shared}
        if task == "translation":
            return {"source": grid, "source_lengths": column, "target_inputs": grid, "targets": grid, **shared}
        return {"inputs": grid, "lengths": column, "labels": column, **shared}

    return [of(length, rows) for length, rows in _buckets(spec, task)]


class Share(NamedTuple):
    """The rows from first/of to end/of of every batch."""

    first: int = 0
    end: int = 1
    of: int = 1

    def rows(self, count: int) -> slice:
        """Where they lie in a batch of so many rows, of which `of` is a divisor."""
        return slice(count * self.first // self.of, count * self.end // self.of)


class Data:
    """The data of a run.

    `tokenizer` decodes what a model predicts. `fingerprint` is what a result must say about its data, as JSON: source,
    sha256 of the text, examples, tokens and bytes of each split, and how many examples were dropped or truncated
    because they are longer than data.length. `splits` are those of "validation" and "test" that exist.
    """

    def __init__(self, spec: DataSpec, task: str, tokens: TokenSet):
        self.tokenizer: Tokenizer = tokens.tokenizer
        self.fingerprint: dict[str, Any] = copy.deepcopy(tokens.facts)
        present = tuple(self.fingerprint["splits"])
        self.splits = tuple(split for split in present if split != "train")
        self._tokens = tokens
        self._buckets = _buckets(spec, task)
        self._batches = _batches(task, tokens, present, spec)
        self._masking = Masking(tokens.tokenizer) if task == "masked_lm" else None
        self._train_rows = self._rows_by_bucket("train", drop=self._batches.drops_long)
        if not any(map(len, self._train_rows)):
            what = "the training text is shorter than" if task in _STREAMS else "every training pair is longer than"
            raise UserError(f"{what} data.length={spec.length} tokens")
        self._schedule = Schedule(self._train_rows, [rows for _, rows in self._buckets])
        for split in present:
            dropped = split == "train" and self._batches.drops_long
            longer = int((self._batches.lengths(split) > spec.length).sum())
            self.fingerprint["splits"][split]["dropped" if dropped else "truncated"] = longer

    def _rows_by_bucket(self, split: str, drop: bool = False) -> list[np.ndarray]:
        """The rows of a split by the shortest bucket that holds them; unless dropped, longer ones go to the longest."""
        lengths = self._batches.lengths(split)
        bucket = np.searchsorted([length for length, _ in self._buckets], lengths)
        last = len(self._buckets) - 1
        return [np.flatnonzero((bucket if drop else np.minimum(bucket, last)) == b) for b in range(last + 1)]

    def train_batch(self, seed: int, step: int, share: Share = Share()) -> Batch:  # noqa: B008 (immutable)
        """The batch that the seed takes at a step (from 0), or a share of its rows. The step alone tells its shape."""
        bucket, rows = self._schedule.at(seed, step)
        length, own = self._buckets[bucket][0], share.rows(len(rows))
        if self._masking is not None:  # draws what is hidden for the whole batch at once
            batch = self._batch("train", rows, length, (seed, step))
            return {name: leaf[own] for name, leaf in batch.items()}
        batch = self._batch("train", rows[own], length, (seed, step))
        return {**batch, "row": batch["row"] + np.int32(own.start)}

    def _batch(self, split: str, rows: np.ndarray, length: int, seed_step: tuple[int, int] | None) -> Batch:
        batch = self._batches.batch(split, rows, length)
        return batch if self._masking is None else self._masking.hide(batch, rows, seed_step)

    def train_stream(self, seeds: Sequence[int], start: int = 0, share: Share = Share()) -> Iterator[Batch]:  # noqa: B008
        """`train_batch` of all seeds stacked [R, B, ...], from step `start` on, made ahead in a thread by grain.

        A seed may stand there more than once, as in a pack of runs.
        """
        import grain

        def stacked(step: int) -> Batch:
            own = {seed: self.train_batch(seed, int(step), share) for seed in set(seeds)}
            return {name: np.stack([own[seed][name] for seed in seeds]) for name in own[seeds[0]]}

        steps = grain.MapDataset.range(start, np.iinfo(np.int32).max).map(stacked)
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))

    def eval_batches(self, split: str) -> Iterator[Batch]:
        """Every example of a split once, in training's shapes; rows that only fill a batch have weight 0.

        In translation "index" [B] is the example's place in the split, -1 where there is none.
        """
        for (length, size), rows in zip(self._buckets, self._rows_by_bucket(split), strict=True):
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                yield self._batch(split, np.pad(part, (0, size - len(part)), constant_values=-1), length, None)

    def num_bytes(self, split: str) -> int:
        """UTF-8 bytes of the text that is predicted in a split: what bits per byte are divided by."""
        return self.fingerprint["splits"][split]["bytes"]

    def token_counts(self, field: str = "text") -> np.ndarray:
        """How often each id of the tokenizer stands in the training texts; of a pair, in "source" or "target"."""
        return np.bincount(self._tokens.tokens("train", field).flat, minlength=self.tokenizer.vocab_size)

    def references(self, split: str) -> list[str]:
        """The target side of a translation split as it was written, in the order of "index"."""
        return self._tokens.references(split)


def _batches(task: str, tokens: TokenSet, splits: tuple[str, ...], spec: DataSpec) -> Batches:
    if task in _STREAMS:
        return (LMBatches if task == "lm" else MaskedBatches)(tokens, splits, spec)
    return TranslationBatches(tokens, splits) if task == "translation" else ClassificationBatches(tokens, splits)


def load(spec: DataSpec, task: str, cache_dir: epath.PathLike) -> Data:
    """Opens the data of a spec, preparing and encoding it first where `cache_dir` has not got it.

    Raises: UserError, in one line, for a source that does not fit the task, files that are missing, empty, not UTF-8 or
        not parallel, an unknown or unreachable TFDS set, and a vocabulary larger than the text supports.
    """
    _buckets(spec, task)
    return Data(spec, task, open_tokens(spec, task, cache_dir))
