"""The theorem of the low-rank bottleneck, on float64 numbers."""

import numpy as np
import pytest

from mha_jax.heads import rank
from mha_jax.specs import UserError

N, D = 7, 13


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("width", [N, N + 4])
def test_a_head_at_least_as_wide_as_the_text_is_long_has_every_attention(width, seed):
    x, p = rank.random_case(N, D, seed)
    head = rank.exact_head(x, p, width)
    assert head.w_q.shape == head.w_k.shape == (D, width)
    # Tolerance: a pseudo-inverse and a decomposition in float64, of condition numbers up to a hundred.
    np.testing.assert_allclose(head.attention(x), p, atol=1e-12)
    assert rank.least_error(p, width) == pytest.approx(0, abs=1e-12)


def test_one_less_is_enough_for_independent_tokens_as_softmax_does_not_see_a_shift_of_a_row():
    x, p = rank.random_case(N, D)
    assert rank.least_rank(p) == N - 1
    np.testing.assert_allclose(rank.exact_head(x, p, N - 1).attention(x), p, atol=1e-12)


@pytest.mark.parametrize("width", [1, 3, N - 2])
def test_a_narrower_head_cannot_have_a_random_attention(width):
    x, p = rank.random_case(N, D)
    with pytest.raises(UserError, match=f"width {width} cannot have this attention over 7 tokens; 6 would do"):
        rank.exact_head(x, p, width)
    assert rank.least_error(p, width) > 0.1
    # No head is nearer than the bound, such as random ones and the best of them by decomposition.
    rng = np.random.default_rng(0)
    for _ in range(50):
        logits = rank.Head(*rng.normal(size=(2, D, width)) / D).logits(x)
        assert np.linalg.matrix_rank(logits) <= width
        assert np.linalg.norm(rank.centred(logits - np.log(p))) >= rank.least_error(p, width)


def test_a_narrow_head_can_have_an_attention_of_low_rank():
    x, _ = rank.random_case(N, D)
    p = rank.Head(*np.random.default_rng(3).normal(size=(2, D, 2)) / D).attention(x)
    assert rank.least_rank(p) == 2
    np.testing.assert_allclose(rank.exact_head(x, p, 2).attention(x), p, atol=1e-12)


def test_the_papers_counterexample_of_two_tokens_in_one_dimension():
    """Tokens 1 and 0: whatever the projections, the second attends to both alike (the paper has it as a column)."""
    x = np.array([[1.0], [0.0]])
    for w_q, w_k in np.random.default_rng(0).normal(size=(20, 2, 1, 1)):
        np.testing.assert_array_equal(rank.Head(w_q, w_k).attention(x)[1], [0.5, 0.5])
    with pytest.raises(UserError, match="the 2 tokens have rank 1; a full row rank is needed"):
        rank.exact_head(x, np.array([[0.5, 0.5], [0.75, 0.25]]), 2)


@pytest.mark.slow
def test_training_finds_what_the_construction_has_and_not_what_the_bound_forbids():
    x, p = rank.random_case(8, 16)
    wide, narrow = rank.fitted_gap(x, p, 8), rank.fitted_gap(x, p, 3)
    assert wide < 0.02 < 0.05 < narrow  # 0.002 and 0.14 here


def test_weights_that_are_not_positive_or_do_not_sum_to_1_are_refused():
    for p in (np.eye(2), np.full((2, 2), 0.4)):
        with pytest.raises(UserError, match="positive, with rows that sum to 1"):
            rank.least_rank(p)
