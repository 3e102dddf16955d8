import numpy as np
import pytest

from mha_jax.data.conllu import Sentence, Word
from mha_jax.data.tokenizers import ByteTokenizer
from mha_jax.data.words import word_rows
from mha_jax.specs import BOS, EOS, UserError


def sentence(name: str, *forms: str) -> Sentence:
    words = (Word(form, form, "X", {}, i - 1, "dep", {}, i > 0) for i, form in enumerate(forms))
    return Sentence(name, tuple(words))


SENTENCES = [sentence("a", "Hé", "ho"), sentence("long", *["word"] * 9), sentence("b", "x")]


@pytest.mark.parametrize(
    ("task", "owners", "starts", "ends"),
    [
        ("lm", [-1, 0, 0, 0, 1, 1, 1], True, False),
        ("masked_lm", [-1, 0, 0, 0, 1, 1, 1, -1], True, True),
        ("translation", [0, 0, 0, 1, 1, 1, -1], False, True),
        ("classification", [0, 0, 0, 1, 1, 1, -1], False, True),
    ],
)
def test_every_piece_knows_its_word(task, owners, starts, ends):
    tokenizer = ByteTokenizer()
    rows = word_rows(SENTENCES, tokenizer, task, 12)
    assert rows.left_out == ("long",)
    assert rows.words[0].tolist() == owners
    ids = rows.ids[0].tolist()
    assert (ids[0] == BOS, ids[-1] == EOS) == (starts, ends)
    assert tokenizer.decode(ids) == "Hé ho"


def test_batches_have_one_shape_and_padding_has_no_weight():
    rows = word_rows(SENTENCES, ByteTokenizer(), "masked_lm", 12)
    (batch,) = rows.batches(4)
    assert [s.name for s in batch.sentences] == ["a", "b"]
    assert batch.words.shape == (4, 12)
    assert batch.batch["lengths"].tolist() == [8, 3, 0, 0]
    np.testing.assert_array_equal(batch.batch["weights"].sum(1), [8, 3, 0, 0])
    assert [len(b.sentences) for b in rows.batches(1)] == [1, 1]


def test_nothing_that_fits_is_an_error():
    with pytest.raises(UserError, match="all 3 sentences have more than the 1 pieces"):
        word_rows(SENTENCES, ByteTokenizer(), "lm", 1)
