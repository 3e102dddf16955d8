"""What every head reads, a vector a word: the features of probes."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mha_jax.data.conllu import Sentence, Word
from mha_jax.data.words import WordRows
from mha_jax.heads.capture import Attended, attentions, kind_of, watch
from mha_jax.models.transformer import Model

_ROWS = 32


class WordFeatures(NamedTuple):
    """N words. `heads` {attention: float32 [N, H, V]} are head outputs before `out` and gates; `embedding` [N, D] is
    that of the pieces alone, without positions. A word's vector is the mean of its pieces'. `sentence` [N] numbers the
    sentences of the words.
    """

    heads: dict[str, np.ndarray]
    embedding: np.ndarray
    words: tuple[Word, ...]
    sentence: np.ndarray
    sentences: tuple[Sentence, ...]


def word_features(model: Model, rows: WordRows) -> WordFeatures:
    """Of all words of the sentences, by the self-attentions that read them: in translation those of the encoder.

    Raises: UserError as `watch` does.
    """
    names = probed(model, rows.task)
    parts: list[dict[str, np.ndarray]] = []
    words: list[Word] = []
    numbers: list[int] = []
    sentences: list[Sentence] = []
    for part in rows.by_length():
        most = max(len(sentence.words) for sentence in part.sentences)
        for batch in part.batches(_ROWS):
            found = jax.device_get(_means(names, most, model, batch.batch, batch.words))
            for row, sentence in enumerate(batch.sentences):
                parts.append({name: x[row, : len(sentence.words)] for name, x in found.items()})
                words += sentence.words
                numbers += [len(sentences)] * len(sentence.words)
                sentences.append(sentence)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in (*names, "embedding")}
    embedding = joined.pop("embedding")
    return WordFeatures(joined, embedding, tuple(words), np.array(numbers), tuple(sentences))


def probed(model: Model, task: str) -> tuple[str, ...]:
    """The self-attentions that read sentences, by name."""
    stack = "decoder" if task == "lm" else "encoder"
    layers = attentions(model)
    return tuple(name for name in layers if kind_of(name) == stack and layers[name].shape.num_heads)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _means(names: Sequence[str], most: int, model: Any, batch: dict[str, Any], words_BT: Array) -> dict[str, Array]:
    owner_BTW = jax.nn.one_hot(words_BT, most)
    owner_BTW = owner_BTW / jnp.maximum(owner_BTW.sum(axis=1, keepdims=True), 1)

    def look(_: str, attended: Attended) -> Array:
        layer, q, k, v, visibility = attended[:5]
        return jnp.einsum("btw,bthv->bwhv", owner_BTW, layer.attended(q, k, v, visibility).astype(jnp.float32))

    found = watch(model, batch, look, names)[1]
    tokens = batch["source"] if "source" in batch else batch["inputs"]
    embedded = model.tokens.embed(tokens).astype(jnp.float32)
    return found | {"embedding": jnp.einsum("btw,btd->bwd", owner_BTW, embedded)}
