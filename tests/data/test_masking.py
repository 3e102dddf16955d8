"""BERT's rule by count, masks as functions of (seed, step) or of the row, rows cut out of the stream of texts."""

import dataclasses

import numpy as np
import pytest

from mha_jax.data import batch_shapes, load
from mha_jax.data.masking import Masking
from mha_jax.data.tokenizers import ByteTokenizer
from mha_jax.specs import BOS, EOS, MASK, PAD, UserError

ROWS, LENGTH = 300, 66


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 260, (ROWS, LENGTH)).astype(np.int32)
    ids[:, 0], ids[:, -1], ids[:, 30] = BOS, EOS, EOS
    weights = np.ones((ROWS, LENGTH), np.float32)
    weights[:, [0, -1]] = 0
    weights[-1] = 0
    return {"inputs": ids, "targets": ids, "lengths": np.full(ROWS, LENGTH), "weights": weights}


@pytest.fixture(scope="module")
def masking():
    return Masking(ByteTokenizer())


def test_15_percent_of_ordinary_tokens_are_chosen_and_80_10_10_of_them_masked_replaced_and_kept(batch, masking):
    hidden = masking.hide(batch, np.arange(ROWS), (0, 0))
    chosen = hidden["weights"] > 0
    # 63 ordinary tokens a row, 9.45 of which are 15 %
    assert (chosen[:-1].sum(axis=1) == 9).all() and not chosen[-1].any()
    assert (batch["inputs"][chosen] >= 4).all()
    np.testing.assert_array_equal(hidden["inputs"][~chosen], batch["inputs"][~chosen])
    np.testing.assert_array_equal(hidden["targets"], batch["inputs"])
    instead, was = hidden["inputs"][chosen], batch["inputs"][chosen]
    masked, kept = (instead == MASK).mean(), (instead == was).mean()
    # Four standard errors of a share of 2,691 tokens: 0.031 at 0.8, 0.023 at 0.1.
    assert abs(masked - 0.8) < 0.031 and abs(kept - 0.1) < 0.023
    others = instead[(instead != MASK) & (instead != was)]
    assert others.min() >= 4 and others.max() > 230 and len(np.unique(others)) > 100
    # every place of a row is chosen about as often as any other
    assert chosen[:, [*range(1, 30), *range(31, 65)]].mean(axis=0).min() > 0.05


def test_training_masks_are_functions_of_seed_and_step(batch, masking):
    once = {key: masking.hide(batch, np.arange(ROWS), key)["inputs"] for key in ((0, 0), (0, 1), (1, 0))}
    again = masking.hide(batch, np.arange(ROWS)[::-1], (0, 1))["inputs"]
    np.testing.assert_array_equal(once[0, 1], again)
    for one, other in [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 1), (1, 0))]:
        assert (once[one] != once[other]).mean() > 0.15


def test_a_row_of_one_token_is_asked_for_it_and_one_of_none_for_nothing(masking):
    ids = np.array([[BOS, 9, EOS], [BOS, EOS, EOS]], np.int32)
    weights = np.array([[0, 1, 0], [0, 1, 0]], np.float32)
    hidden = masking.hide({"inputs": ids, "targets": ids, "weights": weights}, np.arange(2), None)
    np.testing.assert_array_equal(hidden["weights"], [[0, 1, 0], [0, 0, 0]])


def test_rows_are_the_stream_between_a_start_and_an_end(text_spec, tmp_path):
    data = load(text_spec, "masked_lm", tmp_path / "cache")
    (shapes,) = batch_shapes(text_spec, "masked_lm")
    seen = []
    for batch in data.eval_batches("validation"):
        assert {name: (leaf.shape, leaf.dtype) for name, leaf in batch.items()} == {
            name: (leaf.shape, leaf.dtype) for name, leaf in shapes.items()
        }
        for ids, length, weights in zip(batch["targets"], batch["lengths"], batch["weights"], strict=True):
            assert (ids[0], ids[length - 1]) == (BOS, EOS) and (ids[length:] == PAD).all()
            seen += [ids[1 : length - 1]] if weights.any() else []
    stream = np.concatenate(seen)
    assert len(stream) == data.fingerprint["splits"]["validation"]["tokens"]
    assert data.tokenizer.decode(stream[:8]).startswith("9192") and stream[-1] == EOS
    for step in range(20):
        batch = data.train_batch(0, step)
        assert (batch["lengths"] == 17).all()
        assert (batch["weights"].sum(axis=1) == 2).all()  # 15 % of 13 to 15 tokens


def test_evaluation_hides_the_same_tokens_whatever_the_batch(text_spec, tmp_path):
    def rows(batch_size):
        data = load(dataclasses.replace(text_spec, batch_size=batch_size), "masked_lm", tmp_path / "cache")
        batches = list(data.eval_batches("test"))
        inputs, weights = (np.concatenate([b[name] for b in batches]) for name in ("inputs", "weights"))
        return inputs[weights.any(axis=1)]

    np.testing.assert_array_equal(rows(3), rows(5))


@pytest.mark.parametrize("change", [{"buckets": (7, 17)}, {"segments": True}])
def test_what_a_masked_language_model_does_not_read_is_refused(text_spec, tmp_path, change):
    with pytest.raises(UserError, match=r"with task='masked_lm'|not 'masked_lm'"):
        load(dataclasses.replace(text_spec, **change), "masked_lm", tmp_path / "cache")
