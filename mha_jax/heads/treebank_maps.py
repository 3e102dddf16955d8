"""Attention between the words of sentences, batch by batch: what `relations` and `coreference` read."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from mha_jax.data.conllu import Sentence
from mha_jax.data.tokenizers import Tokenizer
from mha_jax.data.words import WordRows, word_rows
from mha_jax.heads.capture import attentions, kind_of
from mha_jax.heads.coreference import Text, texts
from mha_jax.heads.reading import Looking, maps_of, queries_keys
from mha_jax.heads.word_maps import to_words
from mha_jax.models.transformer import Model

_MAP_FLOATS = 2**25  # of all maps of a batch of sentences, held at a time


class WordMaps(NamedTuple):
    """Attention between words, {attention: [B, H, W, W]}, of B sentences; `visible` says which words see each other."""

    sentences: tuple[Sentence, ...]
    weights: dict[str, np.ndarray]
    visible: np.ndarray


def word_maps(model: Model, rows: WordRows) -> Iterator[WordMaps]:
    """Attention between words of the self-attentions that read the sentences, in the order of their length.

    In translation that is the encoder. Words beyond a sentence's last have no attention.
    """
    names = [name for name in attentions(model) if kind_of(name) == ("encoder" if rows.task != "lm" else "decoder")]
    shapes = {name: layer.shape for name, layer in attentions(model).items()}
    groups = {name: shapes[name].head_to_group for name in names}
    heads = sum(shapes[name].num_heads for name in names)
    words = max(len(sentence.words) for sentence in rows.sentences)
    for part in rows.by_length():
        at_once = max(1, min(64, _MAP_FLOATS // max(heads * part.length**2, 1)))
        for batch in part.batches(at_once):
            # Sentences of few pieces have few words; a bound by pieces keeps one program a length.
            most = min(words, part.length)
            _, looking = queries_keys(model, batch.batch)
            maps = {name: _words_in(groups[name], most, looking[name], batch.words) for name in names}
            weights, visible = zip(*jax.device_get(list(maps.values())), strict=True)
            yield WordMaps(batch.sentences, dict(zip(names, weights, strict=True)), visible[0])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _words_in(groups: tuple[int, ...] | None, words: int, looking: Looking, words_BT: Array) -> tuple[Array, Array]:
    """Attention between words [B, H, W, W], and which see each other [B, W, W]."""
    weights, visible = maps_of(looking, groups)
    seen = to_words(visible[:, :1].astype(weights.dtype), words_BT, words)
    return to_words(weights, words_BT, words), seen[:, 0] > 0


def text_rows(
    sentences: Sequence[Sentence],
    tokenizer: Tokenizer,
    task: str,
    length: int,
    mentions: Mapping[str, Sequence[tuple[int, int, str]]] | None = None,
) -> tuple[list[Text], WordRows]:
    """Sentences joined to texts of at most `length` pieces, and their rows; sentences that do not fit are left out.

    Raises: UserError where none fits, and as `coreference.from_misc` does.
    """
    # Inside a text a sentence begins with a space, which may cost a piece.
    spaced = [_spaced(sentence) for sentence in sentences if sentence.words]
    alone = word_rows(spaced, tokenizer, task, length)
    pieces = [int((words >= 0).sum()) for words in alone.words]
    found = texts(alone.sentences, pieces, length - (len(alone.ids[0]) - pieces[0]), mentions)
    rows = word_rows([text.sentence for text in found], tokenizer, task, length)
    return found, dataclasses.replace(rows, left_out=(*alone.left_out, *rows.left_out))


def _spaced(sentence: Sentence) -> Sentence:
    first, *rest = sentence.words
    return dataclasses.replace(sentence, words=(dataclasses.replace(first, space_before=True), *rest))


def text_maps(
    model: Model, found: Iterable[Text], rows: WordRows
) -> Iterator[tuple[list[Text], dict[str, np.ndarray]]]:
    """The texts of each batch of `word_maps`, and attention between their words."""
    by_sentence = {id(text.sentence): text for text in found}
    for batch in word_maps(model, rows):
        yield [by_sentence[id(sentence)] for sentence in batch.sentences], batch.weights
