"""What is known of tiles before anything runs is true, and as sharp as the rule allows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax.attention import Causal, Dense, Full, Global, LogSparse, Padding, PerHead, Segments, SlidingWindow, Strided
from mha_jax.attention.blockmap import EMPTY, FULL, PARTIAL, BlockMap, describe
from mha_jax.attention.regions import Rectangles
from mha_jax.specs import UserError
from tests.attention import test_patterns, test_visibility

T, S = test_visibility.T, test_visibility.S
N = 61
STATIC = [rule for rule, _ in test_patterns.MEANING] + [Full(), Causal(), Causal(5), Causal(-4), Global(9)]
SHARP = [*STATIC[:5], STATIC[8], *STATIC[9:], SlidingWindow(9), Padding(np.array([13])), ~Causal()]


def mask_of(rule, queries, keys):
    # Compiled whole: op by op, each rule would wait for a dozen compilations.
    return np.asarray(jax.jit(lambda: rule.mask(queries, keys))())


def tiles_of(mask, block_q, block_k):
    """The kinds of all tiles by looking at every place; over all examples."""
    heads, queries, keys = mask.shape[1:]
    rows, columns = -(-queries // block_q), -(-keys // block_k)
    kinds = np.zeros((heads, rows, columns), int)
    for h, r, c in np.ndindex(*kinds.shape):
        part = mask[:, h, r * block_q : (r + 1) * block_q, c * block_k : (c + 1) * block_k]
        kinds[h, r, c] = FULL if part.all() else PARTIAL if part.any() else EMPTY
    return kinds


@pytest.mark.parametrize(
    ("rule", "queries", "keys"),
    [*((rule, T, S) for rule, _ in test_visibility.MEANING), *((rule, N, N) for rule in STATIC)],
)
def test_what_bounds_say_is_true_of_every_tile(rule, queries, keys):
    mask = mask_of(rule, queries, keys)
    for block_q, block_k in ((1, 1), (3, 2), (8, 8), (16, 5), (64, 64)):
        expected = tiles_of(mask, block_q, block_k)
        bounds = rule.bounds(Rectangles.tiling(queries, keys, block_q, block_k))
        found = [np.broadcast_to(x, expected.shape) for x in bounds]
        assert (expected[~found[0]] == EMPTY).all()
        assert (expected[found[1]] == FULL).all()


@pytest.mark.parametrize("rule", SHARP)
def test_map_of_a_simple_rule_is_exact(rule):
    mask = mask_of(rule, N, N)
    for block in (1, 4, 7, 16):
        kinds = BlockMap.of(rule, N, N, block, block).kinds
        np.testing.assert_array_equal(kinds, tiles_of(mask, block, block), err_msg=f"{block=}")


def test_known_mask_is_mapped_exactly_for_every_head():
    array = np.random.default_rng(0).random((3, 2, 37, 23)) < 0.9
    array[:, 1, 8:16, 8:16], array[:, 0, :8, :8] = False, True
    kinds = BlockMap.of(Dense(array), 37, 23, 8, 8).kinds
    np.testing.assert_array_equal(kinds, tiles_of(array, 8, 8))
    assert {EMPTY, FULL} <= set(kinds.ravel())


def test_traced_arrays_are_unknown_and_known_ones_are_not():
    lengths = jnp.array([3, 9])
    seen = []
    jax.jit(lambda x: seen.append(BlockMap.of(Padding(x), 16, 16, 4, 4).kinds) or x)(lengths)
    assert (seen[0] == PARTIAL).all()
    assert set(BlockMap.of(Padding(lengths), 16, 16, 4, 4).kinds.ravel()) == {EMPTY, PARTIAL}


def test_heads_that_agree_share_one_map():
    assert len(BlockMap.of(PerHead(Causal(), Causal()), N, N, 8, 8).kinds) == 1
    assert len(BlockMap.of(PerHead(Causal(), Full()), N, N, 8, 8).kinds) == 2


def test_maps_compare_by_content():
    one, other = (BlockMap.of(Causal(), N, N, 8, 8) for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert one != BlockMap.of(Causal(1), N, N, 8, 8)
    assert one.transposed().kinds.tolist() == one.kinds.swapaxes(1, 2).tolist()


@pytest.mark.parametrize("rule", [Causal(), Strided(8), Causal() & LogSparse(), PerHead(Full(), SlidingWindow(3))])
@pytest.mark.parametrize("length", [1, 16, 67])
def test_description_counts_what_is_visible_and_what_is_paid(rule, length):
    told = describe(rule, length, block=16)
    mask = mask_of(rule, length, length)
    assert told.visible == pytest.approx(mask.mean(), abs=1e-6)
    kinds = BlockMap.of(rule, length, length, 16, 16).kinds
    paid = np.repeat(np.repeat(kinds != EMPTY, 16, 1), 16, 2)[:, :length, :length].mean()
    assert told.paid == pytest.approx(paid)
    assert (told.full, told.partial) == ((kinds == FULL).sum(), (kinds == PARTIAL).sum())


def test_visible_share_of_long_squares_is_counted_in_bands():
    length = 4099
    assert describe(Causal(), length).visible == pytest.approx((length + 1) / (2 * length), abs=1e-6)


def test_picture_shows_rows_of_tiles():
    assert (Causal() & SlidingWindow(17)).describe(64, 16).picture == "▒···\n▒▒··\n·▒▒·\n··▒▒"
    assert len(Causal().describe(4096).picture.splitlines()) == 32
    assert "50.01%" in str(Causal().describe(4096))


def test_rule_for_another_length_is_refused():
    with pytest.raises(UserError, match="Segments query ids have 5 positions; T=64"):
        describe(Segments(jnp.zeros((1, 5), int)), 64)
