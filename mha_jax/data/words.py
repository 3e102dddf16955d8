"""Sentences whose words are known, as batches of a run's model: which word every position holds a piece of."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from mha_jax.data.batches import Batch
from mha_jax.data.conllu import Sentence
from mha_jax.data.tokenizers import Tokenizer
from mha_jax.specs import BOS, PAD, UserError

# Whether a text begins with the start token (None: where the tokenizer says so), and whether it ends with the end
# token, as in training's batches.
_FRAMES = {
    "lm": (True, False),
    "masked_lm": (True, True),
    "translation": (False, True),
    "classification": (None, True),
}


@dataclasses.dataclass(frozen=True)
class WordBatch:
    """Rows of sentences, [B, T] pieces.

    `batch` is what `heads.capture.watch` takes; `words` int32 [B, T] is the word of its sentence that a position is a
    piece of, -1 for none; `sentences` are those of the rows, fewer where the last rows are padding.
    """

    batch: Batch
    words: np.ndarray
    sentences: tuple[Sentence, ...]


@dataclasses.dataclass(frozen=True)
class WordRows:
    """Sentences as pieces. `left_out` are the names of sentences with more pieces than `length`."""

    task: str
    length: int
    ids: tuple[np.ndarray, ...]
    words: tuple[np.ndarray, ...]
    sentences: tuple[Sentence, ...]
    left_out: tuple[str, ...]

    def batches(self, rows: int) -> Iterator[WordBatch]:
        """All sentences in order, `rows` at a time, every batch of the same shape [rows, length]."""
        for start in range(0, len(self.ids), rows):
            part = slice(start, start + rows)
            ids_BT = np.full((rows, self.length), PAD, np.int32)
            words_BT = np.full((rows, self.length), -1, np.int32)
            lengths_B = np.zeros(rows, np.int32)
            for row, (ids, words) in enumerate(zip(self.ids[part], self.words[part], strict=True)):
                ids_BT[row, : len(ids)], words_BT[row, : len(ids)], lengths_B[row] = ids, words, len(ids)
            yield WordBatch(self._batch(ids_BT, lengths_B), words_BT, self.sentences[part])

    def by_length(self, shortest: int = 16) -> Iterator["WordRows"]:
        """The sentences parted by length, each part with the least of shortest, 2 * shortest, ... that holds them."""
        limit, done = min(shortest, self.length), 0
        while done < self.length:
            own = [i for i, ids in enumerate(self.ids) if done < len(ids) <= limit]
            if own:
                ids, words = (tuple(column[i] for i in own) for column in (self.ids, self.words))
                yield WordRows(self.task, limit, ids, words, tuple(self.sentences[i] for i in own), self.left_out)
            done, limit = limit, min(2 * limit, self.length)

    def _batch(self, ids_BT: np.ndarray, lengths_B: np.ndarray) -> Batch:
        real_BT = (np.arange(self.length) < lengths_B[:, None]).astype(np.float32)
        if self.task == "lm":
            return {"inputs": ids_BT, "weights": real_BT}
        if self.task == "translation":  # the encoder alone reads the sentence; the decoder is given its start
            start_B1 = np.full((len(ids_BT), 1), BOS, np.int32)
            return {
                "source": ids_BT,
                "source_lengths": lengths_B,
                "target_inputs": start_B1,
                "weights": real_BT[:, :1],
            }
        weights = real_BT if self.task == "masked_lm" else real_BT[:, 0]
        return {"inputs": ids_BT, "lengths": lengths_B, "weights": weights}


def word_rows(sentences: Sequence[Sentence], tokenizer: Tokenizer, task: str, length: int) -> WordRows:
    """Cuts every word into pieces of its own, so that no piece belongs to two words, framed as the task frames texts.

    A word is encoded with the space before it, as it stands in its sentence; a tokenizer that begins every text with a
    space gives one to every word.

    Args:   length: pieces that the model reads at most, start and end tokens included.
    Raises: UserError where no sentence fits.
    """
    starts, ends = _FRAMES[task]
    starts = tokenizer.opens if starts is None else starts
    kept, left_out = [], []
    for sentence in sentences:
        texts = [" " * (word.space_before and not tokenizer.spaced) + word.form for word in sentence.words]
        pieces = tokenizer.encode(texts)
        ids = np.concatenate([[tokenizer.start] * starts, *pieces, [tokenizer.end] * ends]).astype(np.int32)
        owners = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
        words = np.concatenate([[-1] * starts, owners, [-1] * ends]).astype(np.int32)
        if len(ids) <= length:
            kept.append((ids, words, sentence))
        else:
            left_out.append(sentence.name)
    if not kept:
        raise UserError(f"all {len(left_out)} sentences have more than the {length} pieces that the model reads")
    ids, words, those = zip(*kept, strict=True)
    return WordRows(task, length, ids, words, those, tuple(left_out))
