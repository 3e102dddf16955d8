"""Coreference in single heads: does a mention attend to an antecedent more than to other mentions before it?

Clark et al. 2019, section 4.3 and Table 2: of the head words of all mentions that end earlier, a head picks the one to
which the mention's own head word attends most; it is right where that mention is of the same entity. Scored are
mentions with an antecedent in the text. Baselines pick from the same: "nearest" the last mention, "head match" the last
one whose head word is spelled alike, or else the last one.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float

from mha_jax.data.conllu import Sentence, Word
from mha_jax.heads.intervals import Estimate, mean_interval, share_interval
from mha_jax.heads.similarity import Head
from mha_jax.specs import UserError

KINDS = ("all", "pronoun", "proper", "nominal")
BASELINES = ("nearest", "head match")
_BRACKETS = re.compile(r"\((?P<opened>[^()]+)(?P<at_once>\))?|(?P<closed>[^()]+)\)")
_LEAST = 10  # occurrences of a kind of mention that choose a head, and that score it


class Mention(NamedTuple):
    """Words start to end (inclusive) of a text that name an entity; `head` is its head word."""

    start: int
    end: int
    entity: str
    head: int


@dataclasses.dataclass(frozen=True)
class Text:
    """Sentences of a document that a model reads at once, as one, and the mentions in it, by their end."""

    sentence: Sentence
    mentions: tuple[Mention, ...]


@dataclasses.dataclass(frozen=True)
class Antecedents:
    """How often a predictor finds an antecedent, of one kind of mention: `who` is a head or one of the baselines.

    `gain` is over the nearest mention, paired; None for "nearest". Heads were chosen, out of `searched`, on the even
    texts; all are scored on the odd ones.
    """

    kind: str
    who: str
    searched: int
    accuracy: Estimate
    gain: Estimate | None
    mentions: int


def from_misc(sentence: Sentence) -> list[tuple[int, int, str]]:
    """(start, end, entity) of every mention in the MISC column's Entity, as in CorefUD and GUM.

    "(e1-person" opens a mention of e1, "e1)" closes it, "(e1)" is one word; of a mention in parts ("e1[1/2]") every
    part counts as one. Raises: UserError for brackets that do not match.
    """
    found, opened = [], {}
    for place, word in enumerate(sentence.words):
        for match in _BRACKETS.finditer(word.misc.get("Entity", "")):
            name = re.split(r"[-\[]", match["opened"] or match["closed"])[0]
            if match["opened"]:
                opened.setdefault(name, []).append(place)
            if match["closed"] or match["at_once"]:
                if not opened.get(name):
                    raise UserError(
                        f"sentence {sentence.name}, word {place + 1}: entity {name!r} ends, but never began"
                    )
                found.append((opened[name].pop(), place, name))
    if left := [name for name, places in opened.items() if places]:
        raise UserError(f"sentence {sentence.name}: entity {left[0]!r} begins, but never ends")
    return found


def from_table(path: epath.PathLike, sentences: Sequence[Sentence]) -> dict[str, list[tuple[int, int, str]]]:
    """{sentence name: [(start, end, entity)]} from lines "sentence name, first word, last word, entity", by tabs.

    Words are counted from 1, as in CoNLL-U; empty lines and those that begin with # are none.

    Raises: UserError with the line's number for a line that is none, or words that the sentence does not have.
    """
    lengths = {sentence.name: len(sentence.words) for sentence in sentences}
    found: dict[str, list[tuple[int, int, str]]] = {}
    for number, line in enumerate(epath.Path(path).read_text().split("\n"), 1):
        cells = line.rstrip("\r").split("\t")
        if not line.strip() or line.startswith("#"):
            continue
        if len(cells) != 4 or not (cells[1].isdecimal() and cells[2].isdecimal()):
            raise UserError(f"{path}, line {number}: give sentence name, first word, last word and entity, by tabs")
        name, start, end = cells[0], int(cells[1]), int(cells[2])
        if name not in lengths:
            raise UserError(f"{path}, line {number}: the treebank has no sentence {name!r}")
        if not 1 <= start <= end <= lengths[name]:
            raise UserError(f"{path}, line {number}: words {start} to {end}; {name} has words 1 to {lengths[name]}")
        found.setdefault(name, []).append((start - 1, end - 1, cells[3]))
    return found


def texts(
    sentences: Sequence[Sentence],
    pieces: Sequence[int],
    length: int,
    mentions: Mapping[str, Sequence[tuple[int, int, str]]] | None = None,
) -> list[Text]:
    """Sentences that follow each other in a document, joined as long as their pieces fit (the paper: 128 tokens).

    Args: pieces: of each sentence. mentions: by sentence name; default: `from_misc`.
    """
    found: list[Text] = []
    part: list[Sentence] = []
    size = 0
    for sentence, own in zip(sentences, pieces, strict=True):
        if part and (size + own > length or sentence.document != part[0].document):
            found.append(_joined(part, mentions))
            part, size = [], 0
        part, size = [*part, sentence], size + own
    return [*found, _joined(part, mentions)] if part else found


def _joined(sentences: Sequence[Sentence], mentions: Mapping[str, Sequence[tuple[int, int, str]]] | None) -> Text:
    words: list[Word] = []
    found: list[Mention] = []
    for sentence in sentences:
        first = len(words)
        for start, end, entity in from_misc(sentence) if mentions is None else mentions.get(sentence.name, ()):
            found.append(Mention(first + start, first + end, entity, first + _head(sentence, start, end)))
        for place, word in enumerate(sentence.words):
            after = word.head + first if word.head >= 0 else -1
            words.append(dataclasses.replace(word, head=after, space_before=word.space_before if place else first > 0))
    name, document = sentences[0].name, sentences[0].document
    return Text(Sentence(name, tuple(words), document), tuple(sorted(found, key=lambda m: (m.end, -m.start))))


def _head(sentence: Sentence, start: int, end: int) -> int:
    """The first word of a mention that depends on none inside it."""
    inside = range(start, end + 1)
    return next((place for place in inside if sentence.words[place].head not in inside), end)


@dataclasses.dataclass(frozen=True)
class Asked:
    """M mentions with an antecedent: the text and kind of each, and who is right about it, [M, N heads], [M] each."""

    heads: tuple[Head, ...]
    text: np.ndarray
    kind: np.ndarray
    hits: np.ndarray
    baselines: dict[str, np.ndarray]


def asked(batches: Iterable[tuple[Sequence[Text], Mapping[str, Float[np.ndarray, "B H W W"]]]]) -> Asked:
    """Reads attention between words at every mention that has an antecedent.

    Raises: UserError where no mention has one.
    """
    heads: tuple[Head, ...] = ()
    found, number = [], 0
    for part, weights in batches:
        heads = tuple(Head(name, h) for name, x in weights.items() for h in range(x.shape[1]))
        for row, text in enumerate(part):
            own = np.concatenate([x[row] for x in weights.values()])
            found += [(number, *one) for one in _asked_of(text, own)]
            number += 1
    if not found:
        raise UserError("no mention has an antecedent in a text that fits the model")
    text, kind, hits, *baselines = (np.array(column) for column in zip(*found, strict=True))
    return Asked(heads, text, kind, hits, dict(zip(BASELINES, baselines, strict=True)))


def _asked_of(text: Text, weights_NWW: np.ndarray) -> Iterable[tuple[str, np.ndarray, float, float]]:
    words = text.sentence.words
    for mention in text.mentions:
        before = [m for m in text.mentions if m.end < mention.start]
        if not any(m.entity == mention.entity for m in before):
            continue
        right_C = np.array([m.entity == mention.entity for m in before])
        weights_NC = weights_NWW[:, mention.head, [m.head for m in before]]
        top_NC = weights_NC == weights_NC.max(axis=1, keepdims=True)
        hits_N = (top_NC * right_C[None]).sum(axis=1) / top_NC.sum(axis=1)
        form = words[mention.head].form.lower()
        alike = [i for i, m in enumerate(before) if words[m.head].form.lower() == form]
        head_match = right_C[alike[-1] if alike else -1]
        yield _kind(words[mention.head]), hits_N, float(right_C[-1]), float(head_match)


def _kind(word: Word) -> str:
    return {"PRON": "pronoun", "PROPN": "proper"}.get(word.upos, "nominal")


def best_antecedents(found: Asked) -> list[Antecedents]:
    """For all mentions, and each kind with enough of them: the best head and the baselines."""
    rows = []
    for kind in KINDS:
        own = (found.kind == kind) | (kind == "all")
        choose, score = own & (found.text % 2 == 0), own & (found.text % 2 == 1)
        if min(choose.sum(), score.sum()) < _LEAST:
            continue
        head = int(np.argmax(found.hits[choose].mean(axis=0)))
        texts = np.unique(found.text[score], return_inverse=True)[1]
        count = np.bincount(texts)
        sums = {name: np.bincount(texts, weights=hits[score]) for name, hits in found.baselines.items()}
        sums = {str(found.heads[head]): np.bincount(texts, weights=found.hits[score, head])} | sums
        for who, hits in sums.items():
            gain = None if who == "nearest" else mean_interval(hits - sums["nearest"], count)
            searched = 1 if who in BASELINES else len(found.heads)
            rows.append(Antecedents(kind, who, searched, share_interval(hits, count), gain, int(score.sum())))
    return rows
