"""Published patterns: what they show, how much, and how far it reaches, against the papers."""

import itertools
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from mha_jax.attention import (
    BigBird,
    BlockDiagonal,
    Causal,
    EveryNth,
    Fixed,
    LogSparse,
    PrefixLM,
    RandomBlocks,
    SlidingWindow,
    Strided,
    Summary,
)
from mha_jax.attention.patterns import _draw
from mha_jax.specs import UserError

N = 61


def power_of_two(n):
    return n in (1, 2, 4, 8, 16, 32, 64)


MEANING = [
    (SlidingWindow(4, dilation=3), lambda t, s: abs(t - s) in (0, 3, 6, 9)),
    (BlockDiagonal(7), lambda t, s: t // 7 == s // 7),
    (EveryNth(5), lambda t, s: (t - s) % 5 == 0),
    (Summary(7, 2), lambda t, s: s % 7 in (5, 6)),
    (LogSparse(), lambda t, s: t == s or power_of_two(abs(t - s))),
    (Strided(7), lambda t, s: s <= t and (t - s < 7 or (t - s) % 7 == 0)),
    (Fixed(7, 2), lambda t, s: s <= t and (t // 7 == s // 7 or s % 7 >= 5)),
    (PrefixLM(11), lambda t, s: s <= t or s < 11),
    (RandomBlocks(8, 2, 64, seed=3), lambda t, s: s // 8 in RandomBlocks(8, 2, 64, seed=3).drawn[t // 8]),
]


def visible(rule, n):
    # Compiled whole: op by op, each rule and length would wait for a dozen compilations.
    return np.asarray(jax.jit(lambda: rule.mask(n, n))())[0, 0]


def written_out(meaning, n):
    return [[bool(meaning(t, s)) for s in range(n)] for t in range(n)]


@pytest.mark.parametrize(("rule", "meaning"), MEANING)
def test_mask_is_what_the_paper_says(rule, meaning):
    np.testing.assert_array_equal(visible(rule, N), written_out(meaning, N))


@pytest.mark.parametrize("n", [16, 64, 144])
def test_child_strided_reaches_any_earlier_position_in_two_hops_for_n_root_n_pairs(n):
    # Child et al. 2019, section 4.2: p = 2 heads of O(sqrt n) keys each join any two positions in p + 1 = 3 nodes.
    stride = math.isqrt(n)
    near, far = (visible(Causal() & rule, n).astype(int) for rule in (SlidingWindow(stride), EveryNth(stride)))
    assert ((near @ far + far @ near) > 0)[np.tril_indices(n)].all()
    assert max(near.sum(1).max(), far.sum(1).max()) <= stride
    assert visible(Strided(stride), n).sum() <= 2 * n * math.sqrt(n)


@pytest.mark.parametrize("n", [64, 144])
def test_child_fixed_reaches_any_earlier_block_in_two_hops_for_n_root_n_pairs(n):
    block, count = math.isqrt(n), 2
    own, summary = (visible(Causal() & rule, n).astype(int) for rule in (BlockDiagonal(block), Summary(block, count)))
    # Information of s is gathered by the last positions of its block, which all later blocks read.
    two_hops = (summary @ own) > 0
    for t in range(n):
        for s in range(t // block * block):
            assert two_hops[t, s]
    # n (block / 2 within blocks, count * sqrt(n) / 2 across): of the order n sqrt n.
    assert visible(Fixed(block, count), n).sum() <= (count + 1) * n * math.sqrt(n)
    assert own.sum(1).max() <= block and summary.sum(1).max() <= count * n // block


def test_childs_own_settings_look_at_n_root_n_pairs_and_reach_in_two_hops():
    file = Path(__file__).parents[3] / "shared" / "papers" / "child2019_sparse.json"
    if not file.exists():
        pytest.skip("child2019_sparse.json is not in ../shared/papers beside the clone")
    paper = json.loads(file.read_text())
    counts, blocks = re.findall(r"c in ([\d,]+) for l in ([\d,]+)", paper["setup"]["fixed"])[0]
    stride = int(re.findall(r"stride (\d+)", paper["setup"]["enwik8"])[0])
    n = min(row["context"] for row in paper["rows"])
    for block, count in itertools.product(map(int, blocks.split(",")), map(int, counts.split(","))):
        # Of each position's block half, and the ends of all blocks before.
        pairs = sum(t % block + 1 + t // block * count for t in range(n))
        assert visible(Fixed(block, count), n).sum() == pairs < (1 + count) * n * math.sqrt(n)
        own, ends = (visible(Causal() & rule, 1024) for rule in (BlockDiagonal(block), Summary(block, count)))
        position = np.arange(1024) // block
        assert ((ends.astype(np.float32) @ own) > 0)[position[:, None] > position].all()
    # The last `stride` keys, and every stride-th before them.
    pairs = sum(min(t + 1, stride) + t // stride for t in range(n))
    assert visible(Strided(stride), n).sum() == pairs < n * (stride + n / stride)
    near, far = (visible(Causal() & rule, 1024) for rule in (SlidingWindow(stride), EveryNth(stride)))
    assert ((near.astype(np.float32) @ far) > 0)[np.tril_indices(1024)].all()


def test_log_sparse_sees_log_n_keys_and_reaches_all_earlier_ones_in_log_n_layers():
    # Li et al. 2019, theorem 1.
    n = 128
    seen = visible(Causal() & LogSparse(), n).astype(int)
    assert seen.sum(1).max() == 1 + math.log2(n)
    reached = np.linalg.matrix_power(seen, int(math.log2(n)) + 1) > 0
    assert reached[np.tril_indices(n)].all()


def test_big_bird_joins_any_two_positions_in_two_hops_over_its_global_tokens():
    rule = BigBird(8, 9, 2, 4, length=96)
    seen = visible(rule, 96).astype(int)
    assert ((seen @ seen) > 0).all()
    window, drawn, hubs = 2 * 8 + 1, 2 * 8, 4
    assert seen[hubs:].sum(1).max() <= window + drawn + hubs


def test_random_blocks_depend_on_the_seed_alone_and_each_row_sees_as_many():
    rule = RandomBlocks(4, 3, 64, seed=1)
    before = rule.drawn
    _draw.cache_clear()
    assert (before == RandomBlocks(4, 3, 64, seed=1).drawn).all()
    assert (rule.drawn != RandomBlocks(4, 3, 64, seed=2).drawn).any()
    assert (visible(rule, 64).sum(1) == 12).all()


def test_prefix_lengths_differ_by_example():
    mask = np.asarray(jax.jit(lambda lengths: PrefixLM(lengths).mask(7, 7))(np.array([0, 5])))[:, 0]
    np.testing.assert_array_equal(mask[0], np.tri(7, dtype=bool))
    np.testing.assert_array_equal(mask[1], np.tri(7, dtype=bool) | (np.arange(7) < 5))


def test_patterns_pass_through_jit_as_arguments():
    masks = jax.jit(lambda rules: [rule.mask(9, 9)[0, 0] for rule in rules])([rule for rule, _ in MEANING])
    for mask, (_, meaning) in zip(masks, MEANING, strict=True):
        np.testing.assert_array_equal(mask, written_out(meaning, 9))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlidingWindow(4, dilation=0), "SlidingWindow dilation=0 must be an integer of at least 1"),
        (lambda: BlockDiagonal(0), "BlockDiagonal block=0 must be"),
        (lambda: EveryNth(-2), "EveryNth stride=-2 must be"),
        (lambda: EveryNth(2**31), "EveryNth stride=2147483648 must be .* at most 1073741824"),
        (lambda: BigBird(2, 2, 1, 1, 8, seed=-1), "RandomBlocks seed=-1 must be an integer of at least 0"),
        (lambda: Strided(0), "SlidingWindow window=0 must be"),
        (lambda: Summary(4, 5), "Summary count=5 is more than a block of 4 has; 1 to 4 fit"),
        (lambda: RandomBlocks(8, 9, 64), "RandomBlocks count=9 is more than the 8 blocks of length=64"),
        (lambda: RandomBlocks(8, 2, 64).mask(65, 64), "RandomBlocks length=64 is shorter than T=65"),
        (lambda: (Causal() & RandomBlocks(8, 2, 64)).mask(65, 65), "length=65 would do"),
    ],
)
def test_wrong_pattern_is_refused_in_one_line(make, message):
    with pytest.raises(UserError, match=message):
        make()
