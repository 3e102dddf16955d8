"""One text as a model reads it: framed as its task frames texts, and its tokens by name."""

from collections.abc import Iterable
from typing import SupportsInt

import numpy as np

from mha_jax.data.batches import Batch
from mha_jax.data.tokenizers import Tokenizer
from mha_jax.specs import BOS, EOS, UserError


def text_batch(tokenizer: Tokenizer, task: str, length: int, text: str, translation: str | None = None) -> Batch:
    """A batch [1, T] of one text, without padding; the translation is what the decoder of a translation model reads.

    Args:   length: how many tokens the model reads at most, start and end tokens included.
    Raises: UserError for a text without tokens, one that is longer, and a translation where the task has none.
    """
    if (translation is None) == (task == "translation"):
        wanted = "two texts, source and target" if task == "translation" else "one text"
        raise UserError(f"a model of task {task!r} reads {wanted}")
    (own,) = tokenizer.encode([text])
    if task == "translation":
        (target,) = tokenizer.encode([str(translation)])
        source, inputs = _framed([], own, [EOS], length, text), _framed([BOS], target, [], length, str(translation))
        lengths = np.asarray([len(own) + 1], np.int32)
        weights = np.ones(inputs.shape, np.float32)
        return {"source": source, "source_lengths": lengths, "target_inputs": inputs, "weights": weights}
    starts = {"lm": True, "masked_lm": True, "classification": tokenizer.opens}[task]
    ends = task != "lm"
    ids = _framed([tokenizer.start] * starts, own, [tokenizer.end] * ends, length, text)
    weights = np.ones(1 if task == "classification" else ids.shape, np.float32)
    lengths = {} if task == "lm" else {"lengths": np.asarray([ids.shape[1]], np.int32)}
    return {"inputs": ids, **lengths, "weights": weights}


def _framed(before: list[int], own: np.ndarray, behind: list[int], length: int, text: str) -> np.ndarray:
    ids = np.concatenate([before, own, behind]).astype(np.int32)
    if not len(own):
        raise UserError(f"the text {text!r} has no tokens")
    if len(ids) > length:
        raise UserError(f"the text has {len(ids)} tokens with those around it; the model reads at most {length}")
    return ids[None]


def pieces(tokenizer: Tokenizer, ids: Iterable[SupportsInt]) -> list[str]:
    """The text of every token by itself; special ones as [start], [end], [mask], or [number] for any other."""
    special = {number: f"[{number}]" for number in tokenizer.specials}
    special |= {tokenizer.end: "[end]", tokenizer.start: "[start]"}
    if tokenizer.mask is not None:
        special[tokenizer.mask] = "[mask]"
    return [special[number] if number in special else tokenizer.decode([number]) for number in map(int, ids)]
