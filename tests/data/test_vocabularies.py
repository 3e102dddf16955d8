"""WordPiece, GPT-2 and tokenizer.json from files that are written here."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from mha_jax.data import load
from mha_jax.data.tokenizers import train_bpe
from mha_jax.data.vocabularies import FileTokenizer, as_json
from mha_jax.specs import DataSpec, UserError

SPECIAL = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [*SPECIAL, "un", "##aff", "##able", "cafe", "the", "!", "##s", "a"]
LETTERS = ["l", "o", "w", "e", "r", "Ġ", "!", "<|endoftext|>"]


def wordpiece(folder: Path, pieces: list[str]) -> str:
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    return str(folder / "vocab.txt")


def gpt2(folder: Path, end: str = "<|endoftext|>") -> str:
    names = [*LETTERS[:-1], "lo", "low", "er", "Ġlow", end]
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\nl o\nlo w\ne r\nĠ low\n")
    return str(folder / "vocab.json")


def opened(folder: Path, kind: str, path: str, size: int) -> FileTokenizer:
    (folder / "made.json").write_text(as_json(kind, path))
    return FileTokenizer(kind, epath.Path(folder / "made.json"), size)


def test_wordpiece_is_berts(tmp_path):
    tokenizer = opened(tmp_path, "wordpiece", wordpiece(tmp_path, PIECES), 14)
    unknown, end = PIECES.index("[UNK]"), PIECES.index("[SEP]")
    # The longest piece first; lower case without accents; a word that no pieces make is unknown as a whole.
    (ids,) = tokenizer.encode(["Unaffable CAFÉS! unaffablex [SEP]"])
    wanted = [PIECES.index(piece) for piece in ("un", "##aff", "##able", "cafe", "##s", "!")]
    assert ids.tolist()[:7] == [*wanted, unknown] and end not in ids
    assert ids.dtype == np.int32
    assert tokenizer.decode([PIECES.index("[CLS]"), *ids[:6], end]) == "unaffable cafes!"
    assert (tokenizer.start, tokenizer.end, tokenizer.mask, tokenizer.opens) == (3, 4, 5, True)
    assert tokenizer.specials == {0, 2, 3, 4, 5}


def test_wordpiece_with_capital_letters_keeps_case_and_accents(tmp_path):
    tokenizer = opened(tmp_path, "wordpiece", wordpiece(tmp_path, [*PIECES, "The"]), 15)
    assert [ids.tolist() for ids in tokenizer.encode(["The the café"])] == [[14, 10, 2]]


def test_gpt2_merges_bytes_in_the_order_of_its_file(tmp_path):
    tokenizer = opened(tmp_path, "gpt2", gpt2(tmp_path), 12)
    (ids,) = tokenizer.encode(["low lower!"])
    assert ids.tolist() == [8, 10, 9, 6]
    assert tokenizer.decode([*ids, 11]) == "low lower!"
    assert (tokenizer.start, tokenizer.end, tokenizer.mask, tokenizer.opens) == (11, 11, None, False)


def test_a_tokenizer_json_says_its_special_tokens_itself(tmp_path):
    bert = json.loads(as_json("wordpiece", wordpiece(tmp_path, PIECES)))
    # As checkpoints have it: cut and filled up to a length, which rows of our own do not want.
    bert["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(bert))
    tokenizer = opened(tmp_path, "json", str(tmp_path / "tokenizer.json"), 14)
    assert len(tokenizer.encode(["a a a a a a"])[0]) == 6
    assert (tokenizer.start, tokenizer.end, tokenizer.mask, tokenizer.opens) == (3, 4, 5, True)


def test_a_tokenizer_trained_here_opens_as_a_tokenizer_json(tmp_path):
    own = train_bpe(["the cat and the hat"] * 3, 266, epath.Path(tmp_path / "own.json"))
    tokenizer = opened(tmp_path, "json", str(tmp_path / "own.json"), 266)
    assert (tokenizer.start, tokenizer.end, tokenizer.mask, tokenizer.opens) == (1, 2, 3, False)
    np.testing.assert_array_equal(tokenizer.encode(["the hat"])[0], own.encode(["the hat"])[0])


def test_a_labelled_text_begins_with_the_start_that_its_tokenizer_gives(tmp_path):
    (tmp_path / "train.tsv").write_text("x\tthe cafe\ny\tunaffable the the the\n" * 30)
    files, path = {"train": str(tmp_path / "train.tsv")}, wordpiece(tmp_path, PIECES)
    spec = DataSpec("labelled", 5, 4, "wordpiece", 14, path, files=files, num_classes=2)
    data = load(spec, "classification", tmp_path / "cache")
    batch = data.train_batch(0, 0)
    short, long = ([3, 10, 9, 4, 0], 4), ([3, 6, 7, 8, 4], 5)  # the second is cut, and still ends in [SEP]
    for ids, length, label in zip(batch["inputs"].tolist(), batch["lengths"], batch["labels"], strict=True):
        assert (ids, length) == (long if label else short)
    assert data.fingerprint["labels"] == ["x", "y"] and data.fingerprint["tokenizer_sha256"]


def test_a_language_model_on_gpt2s_tokens_starts_and_parts_texts_with_its_end(tmp_path):
    (tmp_path / "a.txt").write_text("low low\n\nlow!\n\n" * 30)
    spec = DataSpec("text", 8, 2, "gpt2", 12, gpt2(tmp_path), files={"train": str(tmp_path / "a.txt")})
    (first, *_) = load(spec, "lm", tmp_path / "cache").eval_batches("test")
    assert first["inputs"][0].tolist() == [11, 8, 6, 11, 8, 10, 11, 8]
    with pytest.raises(UserError, match="the tokenizer 'gpt2' has none"):
        load(spec, "masked_lm", tmp_path / "cache")
    # another order of merges is another tokenizer, though the named file is the same
    (tmp_path / "merges.txt").write_text("l o\n")
    (other, *_) = load(spec, "lm", tmp_path / "cache").eval_batches("test")
    assert other["inputs"][0].tolist()[1:3] == [7, 2]


def test_files_that_are_no_such_tokenizer_are_refused(tmp_path):
    path = wordpiece(tmp_path, PIECES)
    with pytest.raises(UserError, match=r"has 14 tokens; data\.vocab_size=15"):
        opened(tmp_path, "wordpiece", path, 15)
    with pytest.raises(UserError, match="is no json tokenizer: "):
        as_json("json", path)
    with pytest.raises(UserError, match=r"no wordpiece tokenizer: sep_token not found"):
        as_json("wordpiece", wordpiece(tmp_path, ["a", "b"]))
    with pytest.raises(UserError, match=r"has 'a' again in line 3"):
        as_json("wordpiece", wordpiece(tmp_path, ["a", "b", "a"]))
    with pytest.raises(UserError, match=r"has no '<\|endoftext\|>'"):
        as_json("gpt2", gpt2(tmp_path, end="end"))
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"merges\.txt is no file"):
        as_json("gpt2", gpt2_path := str(tmp_path / "vocab.json"))
    (tmp_path / "merges.txt").write_text("three of them\n")
    (tmp_path / "vocab.json").write_text('{"<|endoftext|>": 0}')
    with pytest.raises(UserError, match=r"vocab\.json' is no gpt2 tokenizer"):
        as_json("gpt2", gpt2_path)
    with pytest.raises(UserError, match="has no token that ends a text"):
        bare = json.loads(as_json("wordpiece", wordpiece(tmp_path, PIECES)))
        bare["post_processor"], bare["added_tokens"] = None, []
        bare["model"]["vocab"] = {"[UNK]": 0, "a": 1}
        (tmp_path / "bare.json").write_text(json.dumps(bare))
        opened(tmp_path, "json", str(tmp_path / "bare.json"), 2)


@pytest.mark.parametrize("change", [{"tokenizer_file": None}, {"vocab_size": None}, {"tokenizer": "bytes"}])
def test_a_tokenizer_from_a_file_needs_the_file_and_its_size(change):
    spec = DataSpec("embedded", 8, 2, "wordpiece", 14, "vocab.txt")
    with pytest.raises(UserError, match=r"data\.tokenizer_file=|data\.vocab_size="):
        dataclasses.replace(spec, **change)
