"""A text is framed as its task frames texts, and its tokens are named."""

import numpy as np
import pytest

from mha_jax.data.texts import pieces, text_batch
from mha_jax.data.tokenizers import ByteTokenizer
from mha_jax.specs import BOS, EOS, MASK, UserError

BYTES = ByteTokenizer()
AB = [101, 102]  # "ab": 4 + byte


@pytest.mark.parametrize(
    ("task", "ids", "lengths"),
    [("lm", [BOS, *AB], None), ("masked_lm", [BOS, *AB, EOS], 4), ("classification", [*AB, EOS], 3)],
)
def test_text_is_framed_as_in_training(task, ids, lengths):
    batch = text_batch(BYTES, task, 4, "ab")
    np.testing.assert_array_equal(batch["inputs"], [ids])
    assert batch["weights"].shape == ((1,) if task == "classification" else (1, len(ids)))
    assert ("lengths" in batch) == (lengths is not None) and (lengths is None or batch["lengths"] == [lengths])


def test_pair_has_an_end_behind_its_source_and_a_start_before_its_target():
    batch = text_batch(BYTES, "translation", 4, "ab", "bab")
    np.testing.assert_array_equal(batch["source"], [[*AB, EOS]])
    np.testing.assert_array_equal(batch["source_lengths"], [3])
    np.testing.assert_array_equal(batch["target_inputs"], [[BOS, 102, *AB]])


@pytest.mark.parametrize(
    ("task", "texts", "fault"),
    [
        ("lm", ("abcd",), "the text has 5 tokens with those around it; the model reads at most 4"),
        ("lm", ("",), "the text '' has no tokens"),
        ("lm", ("a", "b"), "a model of task 'lm' reads one text"),
        ("translation", ("a",), "a model of task 'translation' reads two texts, source and target"),
        ("translation", ("a", ""), "the text '' has no tokens"),
    ],
)
def test_text_that_does_not_fit_is_refused(task, texts, fault):
    with pytest.raises(UserError, match=fault):
        text_batch(BYTES, task, 4, *texts)


def test_pieces_are_the_text_of_every_token_and_special_ones_by_what_they_are_for():
    assert pieces(BYTES, [BOS, *AB, MASK, EOS, 0]) == ["[start]", "a", "b", "[mask]", "[end]", "[0]"]
