"""Treebanks in the CoNLL-U format of Universal Dependencies (universaldependencies.org/format.html), plain or .gz."""

import dataclasses
import gzip
import itertools
from collections.abc import Iterator
from typing import NoReturn

from etils import epath

from mha_jax.specs import UserError

_COLUMNS = ("ID", "FORM", "LEMMA", "UPOS", "XPOS", "FEATS", "HEAD", "DEPREL", "DEPS", "MISC")


@dataclasses.dataclass(frozen=True)
class Word:
    """One syntactic word. `head` is the word it depends on, from 0 in the sentence; -1 for the root."""

    form: str
    lemma: str
    upos: str
    feats: dict[str, str]
    head: int
    deprel: str
    misc: dict[str, str]
    space_before: bool  # whether the text has a space in front of it

    @property
    def relation(self) -> str:
        """The universal part of the relation: "nsubj" of "nsubj:pass"."""
        return self.deprel.partition(":")[0]


@dataclasses.dataclass(frozen=True)
class Sentence:
    """The words of a sentence in order; `name` is its sent_id, or the line that it begins on.

    `document` is the id of the last "newdoc" before it; documents without one have the number of their line.
    """

    name: str
    words: tuple[Word, ...]
    document: str = ""


def read(path: epath.PathLike, limit: int | None = None) -> list[Sentence]:
    """The sentences of a file in order, at most `limit`.

    Multi-word tokens ("8-9") and empty nodes ("8.1") are no words. The words of a multi-word token have no space
    between them where they spell it ("do", "n't"), and one elsewhere.

    Raises: UserError with the line's number for a line that is no CoNLL-U; for a file without sentences.
    """
    file = epath.Path(path)
    if not file.exists() or file.is_dir():
        raise UserError(f"treebank {path} is no file")
    raw = file.read_bytes()
    try:
        text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"treebank {path} cannot be read: {error}") from None
    found = list(itertools.islice(_sentences(str(path), text), limit))
    if not found:
        raise UserError(f"treebank {path} has no sentences")
    return found


def _sentences(path: str, text: str) -> Iterator[Sentence]:
    name, document, lines = None, "", []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        line = line.rstrip("\r")
        if line.startswith("#"):
            key, _, value = line[1:].partition("=")
            name = value.strip() if key.strip() == "sent_id" else name
            document = value.strip() or f"line {number}" if key.split()[:1] == ["newdoc"] else document
        elif line.strip():
            lines.append((number, line.split("\t")))
        elif lines:
            yield Sentence(name or f"line {lines[0][0]}", _words(path, lines), document)
            name, lines = None, []


def _words(path: str, lines: list[tuple[int, list[str]]]) -> tuple[Word, ...]:
    rows: list[tuple[int, list[str]]] = []
    units: dict[int, tuple[int, str, dict[str, str]]] = {}  # first word of a multi-word token: its last, form and MISC
    for number, cells in lines:
        if len(cells) != len(_COLUMNS):
            _broken(path, number, f"{len(cells)} columns; CoNLL-U has {len(_COLUMNS)}, parted by tabs")
        first, dash, last = cells[0].partition("-")
        if dash and first == str(len(rows) + 1) and last.isdecimal() and int(last) > int(first):
            units[len(rows)] = (int(last) - 1, cells[1], _pairs(cells[9]))
        elif "." not in first:
            if cells[0] != str(len(rows) + 1):
                _broken(path, number, f"id {cells[0]!r}; word {len(rows) + 1} follows")
            rows.append((number, cells))
    spaces = _spaces([(cells[1], _pairs(cells[9])) for _, cells in rows], units)
    words = []
    for place, (number, cells) in enumerate(rows):
        head = int(cells[6]) - 1 if cells[6].isdecimal() else -2
        if not -1 <= head < len(rows) or head == place:
            _broken(path, number, f"head {cells[6]!r}; 0 is the root, and another of the words 1 to {len(rows)} may be")
        features, misc = _pairs(cells[5]), _pairs(cells[9])
        words.append(Word(cells[1], cells[2], cells[3], features, head, cells[7], misc, spaces[place]))
    return tuple(words)


def _spaces(words: list[tuple[str, dict[str, str]]], units: dict[int, tuple[int, str, dict[str, str]]]) -> list[bool]:
    """Whether each word has a space in front of it."""
    spaces, after, place = [], False, 0
    while place < len(words):
        last, form, misc = units.get(place, (place, *words[place]))
        inside = [form for form, _ in words[place : last + 1]]
        spaces += [after] + ["".join(inside) != form] * (len(inside) - 1)
        after, place = misc.get("SpaceAfter") != "No", last + 1
    return spaces


def _pairs(cell: str) -> dict[str, str]:
    """ "Number=Sing|Person=3" as a dict; "_" is none."""
    parts = (part.partition("=") for part in cell.split("|")) if cell != "_" else ()
    return {name: value for name, _, value in parts}


def _broken(path: str, number: int, fault: str) -> NoReturn:
    raise UserError(f"treebank {path}, line {number}: {fault}")
