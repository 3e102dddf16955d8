"""The kernels in Pallas' interpreter against the reference, with tiles of 16; and lowered for CUDA, by Triton."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax.attention import BigBird, Causal, Dense, Full, Global, Padding, PerHead, Segments, SlidingWindow
from mha_jax.attention.backends import einsum, pallas
from mha_jax.attention.backends.call import Call
from mha_jax.attention.blockmap import EMPTY, FULL, PARTIAL

pytestmark = pytest.mark.slow  # interpreted kernels take seconds each

B, T, S, K, V = 2, 31, 37, 5, 11
IDS = jnp.arange(T)[None] // jnp.array([[7], [40]])
MASK = jnp.asarray(np.random.default_rng(7).random((B, 3, T, S)) < 0.3)
CALL = Call(B, T, S, 6, (0, 0, 1, 1, 2, 2), 3, K, V, jnp.dtype(jnp.float32), Causal(), 0.0)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(pallas, "INTERPRET", True)
    monkeypatch.setattr(pallas, "LARGEST_TILE", 16)


def arrays(heads, groups, queries, keys, qk_dim=K, v_dim=V, dtype=jnp.float32):
    shapes = [(B, queries, heads, qk_dim), (B, keys, groups, qk_dim), (B, keys, groups, v_dim)]
    shapes.append((B, queries, heads, v_dim))
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape).astype(dtype)) for shape in shapes]


def loss(backend, groups, rate, scale, rule, q, k, v, c):
    keys = jax.random.split(jax.random.key(9), B) if rate else None
    out = backend.attend(q, k, v, rule=rule, dropout_rate=rate, dropout_keys=keys, scale=scale, groups=groups)
    return (out * c).astype(jnp.float32).sum(), out


def program(backends, rule, groups, rate=0.0, scale=0.7, traced=False):
    """For each of the backends the gradients for q, k, v, and the output; the rule's arrays are traced or known."""
    slopes = jax.grad(loss, (5, 6, 7), has_aux=True)

    def run(rule, *given):
        return [jax.tree.leaves(slopes(backend, groups, rate, scale, rule, *given)) for backend in backends]

    return functools.partial(jax.jit(run), rule) if traced else jax.jit(functools.partial(run, rule))


def assert_like_reference(rule, queries, keys, groups, rate=0.0, traced=False, **sizes):
    given = arrays(len(groups), max(groups) + 1, queries, keys, **sizes)
    for mine, expected in zip(*program((pallas, einsum), rule, groups, rate, traced=traced)(*given), strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-5)


def test_ragged_groups_a_rule_per_head_and_dropout_match_the_reference():
    rule = PerHead(Causal(-3), Full(), SlidingWindow(5))
    assert_like_reference(rule, T, S, (1, 0, 1), rate=0.3)


@pytest.mark.parametrize(
    ("groups", "length"),
    [((0, 0, 1, 1), 15), ((0, 1, 2), 17), ((0, 0, 0), 32), ((0, 0, 1, 1), 37)],
    ids=["gqa", "mha", "mqa", "gqa of more tiles"],
)
def test_groups_and_lengths_match_the_reference(groups, length):
    assert_like_reference(Causal(), length, length, groups)


WITHOUT_ARRAYS = [
    (Full(), S),
    (Causal() & (SlidingWindow(7) | Global(2)), S),
    (SlidingWindow(3, 4) | ~Causal(9), T),
    (BigBird(block=4, window=3, count=2, num_global=1, length=S), S),
]
WITH_ARRAYS = [
    (Padding(jnp.array([5, 0])), S),
    (Causal() & Segments(IDS), T),
    (Dense(MASK), S),
    (Dense(MASK[:1, :1, :1]), S),
    (PerHead(Padding(jnp.array([5, 31])), Dense(MASK[0, 0]), Causal()), S),
]


@pytest.mark.parametrize(("rule", "keys"), WITHOUT_ARRAYS + WITH_ARRAYS)
def test_rules_match_the_reference(rule, keys):
    assert_like_reference(rule, T, keys, (1, 0, 1))


@pytest.mark.parametrize(("rule", "keys"), WITH_ARRAYS)
def test_rules_of_traced_arrays_match_the_reference(rule, keys):
    assert_like_reference(rule, T, keys, (1, 0, 1), traced=True)


def test_rules_without_arrays_have_nothing_to_trace():
    assert [len(jax.tree.leaves(rule)) > 0 for rule, _ in WITHOUT_ARRAYS + WITH_ARRAYS] == [False] * 4 + [True] * 5


def test_dropout_does_not_depend_on_the_tiles(monkeypatch):
    given = arrays(2, 1, T, S)
    (small,) = program((pallas,), Causal(), (0, 0), rate=0.4)(*given)
    monkeypatch.setattr(pallas, "LARGEST_TILE", 64)
    (large,) = program((pallas,), Causal(), (0, 0), rate=0.4)(*given)
    for mine, other in zip(small, large, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)


def test_widths_of_whole_tiles_in_bfloat16_are_as_near_as_the_reference():
    given = arrays(2, 1, 32, 48, 16, 32, jnp.bfloat16)
    (exact,) = program((einsum,), Full(), (0, 0))(*(x.astype(jnp.float32) for x in given))
    for mine, other, right in zip(*program((pallas, einsum), Full(), (0, 0))(*given), exact, strict=True):
        assert mine.dtype == jnp.bfloat16
        mine, other, right = (np.asarray(x, np.float32) for x in (mine, other, right))
        assert abs(mine - right).max() <= 2 * abs(other - right).max()


def test_rows_that_see_nothing_are_zero_and_hidden_nan_reaches_nobody():
    rule, given = Causal(-3) & Padding(jnp.array([20, S])), arrays(2, 1, T, S)
    blind, hidden = np.zeros((B, T), bool), np.zeros((B, S), bool)
    # Key 28 of the second example would be seen by query 31, the first of those that pad the tile.
    blind[:, :3], hidden[0, 20:], hidden[1, 28:] = True, True, True
    q, k, v, c = given
    poisoned = [np.where(x[..., None, None], np.nan, y) for x, y in ((blind, q), (hidden, k), (hidden, v))]
    both = program((pallas, einsum), rule, (0, 0))
    found, expected = both(*poisoned, c)[0], both(*given)[1]
    for mine, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)
    for mine, unseen in zip(found, (blind, hidden, hidden, blind), strict=True):
        assert (np.asarray(mine)[unseen] == 0).all()


def test_a_traced_scale_has_a_gradient():
    given = arrays(2, 1, 17, 19)
    slopes = [
        jax.grad(lambda scale, backend=backend: loss(backend, (0, 0), 0.0, scale, Full(), *given)[0])
        for backend in (pallas, einsum)
    ]
    mine, expected = jax.jit(lambda scale: [slope(scale) for slope in slopes])(0.7)
    np.testing.assert_allclose(mine, expected, rtol=1e-5)


def test_seeds_at_once_equal_seeds_one_by_one():
    given = [np.stack([x, -x[::-1]]) for x in map(np.asarray, arrays(2, 1, 17, 19))]
    run = program((pallas,), Padding(jnp.array([5, 18])), (0, 0))
    (each,) = jax.vmap(run)(*given)
    for seed in range(2):
        (alone,) = run(*(x[seed] for x in given))
        for mine, other in zip(each, alone, strict=True):
            np.testing.assert_allclose(mine[seed], other, atol=1e-6)


def test_only_what_the_rule_shows_is_visited_and_ragged_ends_have_a_mask():
    tiles = pallas._tiles(Causal() & SlidingWindow(20), 70, 70, 128, 96, 16, 32)
    expected = np.full((8, 3), EMPTY)
    expected[:4, :2] = [[PARTIAL, EMPTY], [PARTIAL, EMPTY], [PARTIAL, PARTIAL], [PARTIAL, PARTIAL]]
    expected[4] = [EMPTY, PARTIAL, PARTIAL]
    np.testing.assert_array_equal(tiles.kinds[0], expected)
    np.testing.assert_array_equal(pallas._tiles(Full(), 32, 70, 32, 96, 16, 32).kinds[0], [[FULL, FULL, PARTIAL]] * 2)


def test_no_sizes_give_zeros():
    q, k, v, _ = arrays(2, 1, T, 0)
    out = pallas.attend(q, k, v, rule=Full(), dropout_rate=0.0, dropout_keys=None, scale=1.0, groups=(0, 0))
    assert out.shape == (B, T, 2, V) and not out.any()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"partitioned": True}, "cannot split"),
        ({"dtype": jnp.dtype(jnp.float64)}, "not float64"),
        ({"qk_dim": 257}, "qk_dim=257, v_dim=11 .* up to 256"),
        (
            {"rule": BigBird(64, 3, 1, 1, 2**16), "queries": 2**16, "keys": 2**16},
            "mask of 4294967296 elements is more than it can address",
        ),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(change, reason):
    assert pallas.refusal(CALL) is None
    assert re.search(reason, pallas.refusal(dataclasses.replace(CALL, **change)) or "")


def test_other_platforms_are_refused(monkeypatch):
    monkeypatch.setattr(pallas, "INTERPRET", False)
    assert "run on GPU, and this is cpu" in (pallas.refusal(CALL) or "")


def lowered_for_cuda(rule, dtype, qk_dim, v_dim, rate=0.0):
    given = arrays(3, 2, T, T, qk_dim, v_dim, dtype)
    slopes = jax.grad(lambda rule, *given: loss(pallas, (1, 0, 1), rate, 0.7, rule, *given)[0], (1, 2, 3))
    return jax.jit(slopes).trace(rule, *given).lower(lowering_platforms=("cuda",)).as_text()


def assert_lowers_for_cuda(monkeypatch, *call):
    monkeypatch.setattr(pallas, "INTERPRET", False)
    text = lowered_for_cuda(*call)
    for kernel in ("forward", "backward_queries", "backward_keys"):
        assert f'name = "{kernel}"' in text
    assert text.count("gpu.triton") == 3


def test_forward_and_backward_lower_for_cuda(monkeypatch):
    assert_lowers_for_cuda(monkeypatch, PerHead(Causal(), Full(), SlidingWindow(5)), jnp.bfloat16, K, V, 0.3)


@pytest.mark.parametrize("width", [16, 64, 128, 256])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_widths_and_types_lower_for_cuda(monkeypatch, dtype, width):
    monkeypatch.setattr(pallas, "LARGEST_TILE", 128)
    assert_lowers_for_cuda(monkeypatch, Causal(), dtype, width, width)


@pytest.mark.parametrize(
    "rule",
    [
        Causal() & (SlidingWindow(7) | Global(2)),
        SlidingWindow(3, 4) | ~Causal(9),
        Causal() & Padding(jnp.array([5, 0])),
        Segments(IDS),
        Dense(MASK[..., :T]),
        BigBird(block=4, window=3, count=2, num_global=1, length=T),
    ],
)
def test_rules_lower_for_cuda(monkeypatch, rule):
    assert_lowers_for_cuda(monkeypatch, rule, jnp.bfloat16, 16, 16)
