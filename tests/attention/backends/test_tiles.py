"""Tiles of a rule give the rule's mask back, and only those are worked out of which its bounds do not say enough."""

import jax
import numpy as np
import pytest

from mha_jax.attention import BigBird, Causal, Dense, Full, Global, PerHead, SlidingWindow
from mha_jax.attention.backends.tiles import head_masks
from mha_jax.attention.rule import Rule

NOTHING = ~Full()
RULES = {
    "full": Full(),
    "nothing": NOTHING,
    "causal": Causal(-3),
    "window or global": Causal() & (SlidingWindow(5) | Global(2)),
    "dense": Dense(np.random.default_rng(0).random((67, 41)) < 0.3),
    "bigbird": BigBird(block=8, window=3, count=2, num_global=1, length=67),
    "per head": PerHead(Causal(), Full(), NOTHING, SlidingWindow(7)),
}


def whole(mask):
    slices = [[slice(i, i + size) for i in range(0, n, size)] for n, size in zip(mask.shape, mask.block, strict=True)]
    return np.block([[mask[t, s] for s in slices[1]] for t in slices[0]])


@pytest.mark.parametrize(("queries", "keys"), [(67, 41), (48, 32)])
@pytest.mark.parametrize("name", RULES)
def test_tiles_and_coverage_are_those_of_the_mask(name, queries, keys):
    rule = Dense(RULES[name].array[:queries, :keys]) if name == "dense" else RULES[name]
    masks = head_masks(rule, queries, keys, 16, 8)
    expected = np.asarray(jax.jit(lambda: rule.mask(queries, keys)[0])())
    assert len(masks) == len(expected)
    for mask, visible in zip(masks, expected, strict=True):
        found = whole(mask)
        np.testing.assert_array_equal(found[:queries, :keys], visible)
        assert not found[:, keys:].any()
        sees, seen = mask.coverage(queries)
        np.testing.assert_array_equal(sees, found[:queries].any(1))
        np.testing.assert_array_equal(seen, found[:queries].any(0))


def test_masks_of_equal_content_are_one():
    one, other, third = (head_masks(rule, 67, 41, 16, 8)[0] for rule in (Causal(), Causal() & Full(), Causal(1)))
    assert one == other and hash(one) == hash(other) and one != third


class _Counting(Rule):
    """Causal, counting the places that are worked out."""

    places = 0

    def at(self, b, h, t, s):
        self.places += t.size * s.size
        return Causal().at(b, h, t, s)

    def bounds(self, where):
        return Causal().bounds(where)


def test_long_masks_are_worked_out_on_the_diagonal_only_and_kept_as_three_tiles():
    rule = _Counting()
    (mask,) = head_masks(rule, 4096, 4096, 128, 128)
    assert rule.places == 32 * 128 * 128
    assert len(mask.tiles_NQK) == 3


def test_rules_are_worked_out_while_a_program_is_traced():
    def traced(x):
        (mask,) = head_masks(Causal() & Dense(np.ones((1, 9), bool)), 9, 9, 8, 8)
        return x + mask.coverage(9)[0].sum()

    assert jax.jit(traced)(0) == 9
