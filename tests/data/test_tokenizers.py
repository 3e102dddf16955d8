import numpy as np
import pytest

from mha_jax.data.tokenizers import BPETokenizer, ByteTokenizer, train_bpe
from mha_jax.specs import SPECIAL_TOKENS, UserError

TEXTS = ["the cat sat on the mat", "die Kätze saß auf der Mätte", "the <eos> cat", "", " two  spaces\n\ttab 漢字 "] * 3


@pytest.fixture
def bpe(tmp_path) -> BPETokenizer:
    from etils import epath

    return train_bpe(TEXTS, 290, epath.Path(tmp_path / "tokenizer.json"))


def test_bytes_are_four_plus_the_byte():
    (ids,) = ByteTokenizer().encode(["aÄ"])
    np.testing.assert_array_equal(ids, [4 + 97, 4 + 0xC3, 4 + 0x84])
    assert ByteTokenizer().vocab_size == 260


def test_every_text_survives_encoding_and_decoding(bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        for text, ids in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
            assert tokenizer.decode(ids) == text


def test_bpe_knows_text_that_it_was_not_trained_on(bpe):
    text = "Ωmega \x00 🜚 zzz"
    assert bpe.decode(bpe.encode([text])[0]) == text


def test_special_tokens_spelled_out_are_ordinary_text(bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        for name in SPECIAL_TOKENS:
            (ids,) = tokenizer.encode([f"a{name}b"])
            assert ids.min() >= len(SPECIAL_TOKENS)
            assert tokenizer.decode(ids) == f"a{name}b"


def test_decoding_leaves_special_tokens_out_and_bears_broken_bytes(bpe):
    assert ByteTokenizer().decode([1, 4 + 97, 2, 0, 0]) == "a"
    assert ByteTokenizer().decode([4 + 0xC3]) == "\ufffd"
    assert bpe.decode([1, *bpe.encode(["cat"])[0], 2, 0]) == "cat"


def test_bpe_merges_and_has_exactly_the_size_asked_for(bpe):
    assert bpe.vocab_size == 290
    assert len(bpe.encode(["the cat"])[0]) < len("the cat")


def test_bpe_training_is_deterministic(bpe, tmp_path):
    from etils import epath

    again = train_bpe(iter(TEXTS), 290, epath.Path(tmp_path / "again.json"))
    assert again.path.read_text() == bpe.path.read_text()


def test_vocabulary_larger_than_the_text_supports_names_the_size_that_fits(tmp_path):
    from etils import epath

    with pytest.raises(UserError, match=r"data\.vocab_size=5000 .* at most \d+ fit") as error:
        train_bpe(TEXTS, 5000, epath.Path(tmp_path / "t.json"))
    fits = int(str(error.value).split("at most ")[1].split()[0])
    assert train_bpe(TEXTS, fits, epath.Path(tmp_path / "t.json")).vocab_size == fits
