"""The tokenizer of llama2.c: merges against the plain search for the best pair, bytes, files that are none."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from mha_jax.data.pieces import PieceTokenizer, read_pieces
from mha_jax.specs import UserError
from tests.pretrained import files

IDS = {text: 259 + number for number, text in enumerate((*files.LETTERS, *files.MERGES))}


@pytest.fixture
def pieces(tmp_path: Path) -> PieceTokenizer:
    return PieceTokenizer(epath.Path(files.tokenizer(tmp_path / "tokenizer.bin")), 271)


def plain_search(text: str) -> list[int]:
    """llama2.c's own loop: look at every pair, merge the best one, begin again."""
    names = list(" " + text)
    while True:
        merged = [("".join(pair), place) for place, pair in enumerate(itertools.pairwise(names))]
        known = [(files.MERGES.index(name), place) for name, place in merged if name in files.MERGES]
        if not known:
            return [IDS[name] for name in names]
        rank, place = min(known)
        names[place : place + 2] = [files.MERGES[rank]]


def test_the_best_pair_is_merged_first_and_of_equals_the_leftmost(pieces: PieceTokenizer):
    rng = np.random.default_rng(0)
    for _ in range(50):
        text = "".join(rng.choice(list(files.LETTERS), 40))
        (ids,) = pieces.encode([text])
        assert ids.tolist() == plain_search(text)
        assert pieces.decode(ids) == text


def test_letters_that_are_no_piece_become_bytes(pieces: PieceTokenizer):
    (ids,) = pieces.encode(["é"])
    assert ids.tolist() == [IDS[" "], 3 + 0xC3, 3 + 0xA9]
    for text in ("漢字 abc\t\x00", "<s> <0x41>", "  two", ""):
        assert pieces.decode(pieces.encode([text])[0]) == text


def test_decoding_drops_the_space_that_a_text_begins_with_and_special_tokens(pieces: PieceTokenizer):
    assert pieces.decode([1, IDS[" abc"], IDS[" a"], 1, IDS[" a"], 0, 2]) == "abc aa"
    assert pieces.decode([3 + 0xC3]) == "\ufffd"


def test_texts_end_with_the_token_that_starts_the_next(pieces: PieceTokenizer):
    assert pieces.end == 1


def test_a_tokenizer_of_another_size_is_refused(pieces: PieceTokenizer):
    with pytest.raises(UserError, match=r"has 271 pieces; data\.vocab_size=512"):
        PieceTokenizer(pieces.path, 512)


@pytest.mark.parametrize("change", [lambda raw: raw[:-1], lambda raw: raw[:3], lambda raw: b"", lambda raw: raw + b"a"])
def test_a_file_that_is_no_whole_tokenizer_is_refused(tmp_path: Path, change):
    file = epath.Path(files.tokenizer(tmp_path / "tokenizer.bin"))
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError, match=r"is no whole llama2\.c tokenizer"):
        read_pieces(file)
