"""Rows of token ids packed into the arrays that a task's model takes. A row of -1 is padding: row 0 with weight 0.

Every text ends in the tokenizer's end token. One of a pair, or a labelled one, that is longer than the batch keeps its
first tokens and an end; `lengths` says how long it was.

Each task's class has `lengths(split)`: the tokens of every row, the end token included; `batch(split, rows, length)`:
the rows as arrays of `length` columns; and `drops_long`: whether training leaves rows out that do not fit, or cuts
them.
"""

import numpy as np

from mha_jax.data.tokenised import Tokens, TokenSet
from mha_jax.specs import BOS, EOS, PAD, DataSpec

Batch = dict[str, np.ndarray]


def _padded(tokens: Tokens, rows: np.ndarray, length: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """ids [B, length] and lengths [B] of the texts, cut to `length` with `end` last."""
    rows = np.maximum(rows, 0)
    starts = tokens.offsets[rows]
    whole = tokens.offsets[rows + 1] - starts
    columns = np.arange(length)
    index = np.minimum(starts[:, None] + columns, len(tokens.flat) - 1)
    ids = np.where(columns < whole[:, None], tokens.flat[index], PAD).astype(np.int32)
    ids[whole > length, -1] = end
    return ids, np.minimum(whole, length).astype(np.int32)


class LMBatches:
    """A split is one stream, the start token and then every text; row i predicts its tokens i * T to (i + 1) * T.

    In training the tokens behind the last whole window are left out; evaluation pads them. Segments, where asked for,
    number the texts of a window: a text begins with the end token before it and sees nothing further back.
    """

    drops_long = True

    def __init__(self, tokens: TokenSet, splits: tuple[str, ...], spec: DataSpec):
        self._streams = {split: tokens.tokens(split, "text").flat for split in splits}
        self._length, self._segments = spec.length, spec.segments
        self._start, self._end = tokens.tokenizer.start, tokens.tokenizer.end

    def lengths(self, split: str) -> np.ndarray:
        size = len(self._streams[split])
        windows = size // self._length if split == "train" else -(-size // self._length)
        return np.full(windows, self._length)

    def batch(self, split: str, rows: np.ndarray, length: int) -> Batch:
        stream = self._streams[split]
        places = np.maximum(rows, 0)[:, None] * length + np.arange(length)
        real = places < len(stream)
        targets = np.where(real, stream[np.minimum(places, len(stream) - 1)], PAD).astype(np.int32)
        inputs = np.where(real, stream[np.clip(places - 1, 0, len(stream) - 1)], PAD).astype(np.int32)
        inputs[places == 0] = self._start
        weights = (real & (rows >= 0)[:, None]).astype(np.float32)
        batch = {"inputs": inputs, "targets": targets, "weights": weights, "row": _row(rows)}
        if self._segments:
            batch["segments"] = np.cumsum(inputs == self._end, axis=1, dtype=np.int32)
        return batch


class MaskedBatches:
    """A split is one stream, every text after the other; row i is a start, its tokens i * (T - 2) and on, and an end.

    Nothing is hidden yet: `masking` does that. In training the tokens behind the last whole window are left out; in
    evaluation the last row is shorter.
    """

    drops_long = True

    def __init__(self, tokens: TokenSet, splits: tuple[str, ...], spec: DataSpec):
        self._streams = {split: tokens.tokens(split, "text").flat for split in splits}
        self._length, self._start, self._end = spec.length, tokens.tokenizer.start, tokens.tokenizer.end

    def lengths(self, split: str) -> np.ndarray:
        size, inside = len(self._streams[split]), self._length - 2
        return np.full(size // inside if split == "train" else -(-size // inside), self._length)

    def batch(self, split: str, rows: np.ndarray, length: int) -> Batch:
        stream, columns = self._streams[split], np.arange(length)
        first = np.maximum(rows, 0) * (length - 2)
        lengths = np.minimum(len(stream) - first, length - 2) + 2
        places = np.minimum(first[:, None] + np.maximum(columns - 1, 0), len(stream) - 1)
        inside = (columns > 0) & (columns < lengths[:, None] - 1)
        ids = np.where(inside, stream[places], PAD).astype(np.int32)
        ids[:, 0] = self._start
        ids[np.arange(len(rows)), lengths - 1] = self._end
        weights = (inside & (rows >= 0)[:, None]).astype(np.float32)
        lengths = lengths.astype(np.int32)
        return {"inputs": ids, "targets": ids, "lengths": lengths, "weights": weights, "row": _row(rows)}


class TranslationBatches:
    """A row is a pair; its length is that of the longer side. Pairs that do not fit are left out of training."""

    drops_long = True

    def __init__(self, tokens: TokenSet, splits: tuple[str, ...]):
        self._source = {split: tokens.tokens(split, "source") for split in splits}
        self._target = {split: tokens.tokens(split, "target") for split in splits}

    def lengths(self, split: str) -> np.ndarray:
        return np.maximum(self._source[split].lengths, self._target[split].lengths)

    def batch(self, split: str, rows: np.ndarray, length: int) -> Batch:
        source, source_lengths = _padded(self._source[split], rows, length, EOS)
        targets, target_lengths = _padded(self._target[split], rows, length, EOS)
        real = np.arange(length) < target_lengths[:, None]
        first = np.full((len(rows), 1), BOS, np.int32)
        batch = {
            "source": source,
            "source_lengths": source_lengths,
            "target_inputs": np.where(real, np.concatenate([first, targets[:, :-1]], axis=1), PAD).astype(np.int32),
            "targets": targets,
            "weights": (real & (rows >= 0)[:, None]).astype(np.float32),
            "row": _row(rows),
        }
        if split != "train":
            batch["index"] = rows.astype(np.int32)
        return batch


class ClassificationBatches:
    """A row is a text and its label; long texts are cut, in training too."""

    drops_long = False

    def __init__(self, tokens: TokenSet, splits: tuple[str, ...]):
        self._texts = {split: tokens.tokens(split, "text") for split in splits}
        self._labels = {split: tokens.labels(split) for split in splits}
        self._end = tokens.tokenizer.end

    def lengths(self, split: str) -> np.ndarray:
        return self._texts[split].lengths

    def batch(self, split: str, rows: np.ndarray, length: int) -> Batch:
        inputs, lengths = _padded(self._texts[split], rows, length, self._end)
        labels = self._labels[split][np.maximum(rows, 0)]
        weights = (rows >= 0).astype(np.float32)
        return {"inputs": inputs, "lengths": lengths, "labels": labels, "weights": weights, "row": _row(rows)}


def _row(rows: np.ndarray) -> np.ndarray:
    return np.arange(len(rows), dtype=np.int32)


Batches = LMBatches | MaskedBatches | TranslationBatches | ClassificationBatches
