import numpy as np
import pytest
from etils import epath
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers

from mha_jax.data.conllu import Sentence, Word
from mha_jax.data.texts import text_batch
from mha_jax.data.tokenizers import ByteTokenizer
from mha_jax.data.vocabularies import FileTokenizer, as_json
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


BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "bc"]


def test_a_text_begins_with_cls_where_a_classifier_is_trained_on_such(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(BERT) + "\n")
    (tmp_path / "made.json").write_text(as_json("wordpiece", str(tmp_path / "vocab.txt")))
    tokenizer = FileTokenizer("wordpiece", epath.Path(tmp_path / "made.json"), len(BERT))
    rows = word_rows([sentence("a", "a", "bc")], tokenizer, "classification", 12)
    assert rows.ids[0].tolist() == [2, 4, 5, 3]
    (batch,) = text_batch(tokenizer, "classification", 12, "a bc")["inputs"]
    assert rows.ids[0].tolist() == batch.tolist()


def test_a_word_has_one_space_before_it_where_the_tokenizer_puts_it_there(tmp_path):
    pieces = {"<s>": 0, "</s>": 1, "▁": 2, "a": 3, "b": 4, "▁a": 5, "▁b": 6}
    backend = Backend(models.BPE(pieces, [("▁", "a"), ("▁", "b")]))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # as Llama's
    backend.save(str(tmp_path / "made.json"))
    tokenizer = FileTokenizer("json", epath.Path(tmp_path / "made.json"), len(pieces))
    assert word_rows([sentence("a", "a", "b")], tokenizer, "lm", 12).ids[0].tolist() == [0, 5, 6]


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
