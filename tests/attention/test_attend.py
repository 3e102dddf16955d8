"""Attention is its definition, with poison, dropout, gates and empty axes; what does not fit is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax import attention
from mha_jax.attention import Causal, Dense, Full, LogSparse, Padding, PerHead, SlidingWindow
from mha_jax.specs import UserError

B, T, S, K, V = 2, 7, 5, 3, 11
# Compiled whole: op by op, each small test would wait for dozens of compilations.
compiled = jax.jit(attention.attend, static_argnames=("dropout_rate", "head_to_group", "backend"))


@pytest.fixture(params=["einsum", pytest.param("blockwise", marks=pytest.mark.slow)])
def attend(request):
    return functools.partial(compiled, backend=request.param)


def arrays(heads=6, groups=3, queries=T, keys=S, dtype=jnp.float32, v_dim=V):
    shapes = (B, queries, heads, K), (B, keys, groups, K), (B, keys, groups, v_dim), (B, queries, heads, v_dim)
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape).astype(dtype)) for shape in shapes]


def by_loops(q, k, v, visible, groups, gate=None, scale=None):
    """The definition, one number at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    visible = np.broadcast_to(visible, (B, q.shape[2], q.shape[1], k.shape[1]))
    o = np.zeros((*q.shape[:3], v.shape[3]))
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = [s for s in range(k.shape[1]) if visible[b, h, t, s]]
        logits = [q[b, t, h] @ k[b, s, groups[h]] * (K**-0.5 if scale is None else scale) for s in seen]
        total = sum(np.exp(logits))
        for s, logit in zip(seen, logits, strict=True):
            o[b, t, h] += np.exp(logit) / total * v[b, s, groups[h]]
    return o if gate is None else o * np.asarray(gate, np.float64)[..., None]


def with_slopes(function):
    """The program of a function's output and the gradients of sum(output * c) for q, k and v."""

    def objective(q, k, v, c):
        o = function(q, k, v)
        return (o * c).sum(), o

    @jax.jit
    def program(q, k, v, c):
        (_, o), slopes = jax.value_and_grad(objective, (0, 1, 2), has_aux=True)(q, k, v, c)
        return o, *slopes

    return lambda *given: jax.device_get(program(*given))


@pytest.mark.parametrize(
    ("groups", "rule", "options"),
    [
        (6, Full(), {}),
        (1, Causal(), {"is_causal": True}),
        (3, Causal() & Padding(jnp.array([2, 5])), {"is_causal": True, "key_value_seq_lengths": jnp.array([2, 5])}),
    ],
    ids=["mha", "mqa", "gqa"],
)
def test_outputs_and_gradients_match_jax_nn(attend, groups, rule, options):
    given = arrays(6, groups, v_dim=K)
    ours = with_slopes(lambda *x: attend(*x, rule))(*given)
    theirs = with_slopes(lambda *x: jax.nn.dot_product_attention(*x, **options))(*given)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)


@pytest.mark.parametrize("gate_shape", [(4,), (B, 4), (B, T, 4)])
def test_ragged_groups_and_gates_match_the_definition(attend, gate_shape):
    q, k, v, _ = arrays(4, 3)
    groups, gate = (2, 0, 2, 1), jnp.asarray(np.random.default_rng(9).normal(size=gate_shape), jnp.float32)
    rule = PerHead(Causal(), Full(), Padding(jnp.array([2, 0])), Causal(-2))
    o = attend(q, k, v, rule, gate=gate, scale=0.7, head_to_group=groups)
    full_gate = np.broadcast_to(np.asarray(gate)[:, None] if gate.ndim == 2 else gate, (B, T, 4))
    visible = jax.jit(lambda: rule.mask(T, S))()
    np.testing.assert_allclose(o, by_loops(q, k, v, visible, groups, full_gate, 0.7), atol=1e-5)


@pytest.mark.parametrize("groups", [6, 3, 1], ids=["mha", "gqa", "mqa"])
def test_float64_matches_the_definition_and_its_finite_differences(attend, groups):
    with jax.enable_x64(True):
        q, k, v, c = arrays(6, groups, dtype=jnp.float64)
        visible = np.random.default_rng(7).random((B, 6, T, S)) < 0.6
        heads = [h // (6 // groups) for h in range(6)]
        o, *slopes = with_slopes(lambda *x: attend(*x, Dense(visible)))(q, k, v, c)
        assert o.dtype == jnp.float64
        np.testing.assert_allclose(o, by_loops(q, k, v, visible, heads), atol=1e-12)
        q, k, v, c = map(np.asarray, (q, k, v, c))
        rng, step = np.random.default_rng(0), 1e-6
        for i, gradient in enumerate(slopes):
            direction = rng.normal(size=gradient.shape)
            ends = []
            for h in (step, -step):
                moved = [x + h * direction if i == j else x for j, x in enumerate((q, k, v))]
                ends.append((by_loops(*moved, visible, heads) * c).sum())
            np.testing.assert_allclose((gradient * direction).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-6)


@pytest.mark.parametrize("head_to_group", [None, (0, 2, 2, 0, 1, 0)], ids=["regular", "ragged"])
def test_query_that_sees_nothing_gives_zero_and_gradient_zero(attend, head_to_group):
    q, k, v, c = arrays()
    visible = np.ones((B, 6, T, S), bool)
    visible[0, :, 3], visible[1, 2] = False, False
    empty = ~visible.any(-1).transpose(0, 2, 1)
    run = with_slopes(lambda *x: attend(*x, Dense(visible), head_to_group=head_to_group))
    clean = run(q, k, v, c)
    assert (clean[0][empty] == 0).all()
    # In an empty row even a NaN query reaches nobody.
    dirty = run(np.where(empty[..., None], np.nan, q), k, v, c)
    for mine, other in zip(dirty, clean, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert (dirty[1][empty] == 0).all()


@pytest.mark.parametrize("head_to_group", [None, (0, 2, 2, 0, 1, 0)], ids=["regular", "ragged"])
def test_poison_in_keys_that_nobody_sees_reaches_nobody(attend, head_to_group):
    q, k, v, c = arrays()
    groups = head_to_group or (0, 0, 1, 1, 2, 2)
    visible = np.random.default_rng(7).random((B, 6, T, S)) < 0.5
    visible[0, :, :, 1] = False
    visible[1, [h for h in range(6) if groups[h] == 2], :, 4] = False
    hidden = np.zeros((B, S, 3, 1), bool)
    hidden[0, 1], hidden[1, 4, 2] = True, True
    run = with_slopes(lambda *x: attend(*x, Dense(visible), head_to_group=head_to_group))
    clean = run(q, k, v, c)
    assert np.isfinite(clean[0]).all()
    for gradient in clean[2:]:
        assert (gradient[hidden[..., 0]] == 0).all()
    for poison in (np.float32(np.nan), np.float32(np.inf)):
        dirty = run(q, np.where(hidden, poison, k), np.where(hidden, poison, v), c)
        for mine, other in zip(dirty, clean, strict=True):
            np.testing.assert_array_equal(mine, other)


# Queries that fill up a tile would see keys beyond the real ones: 101 is no multiple of any tile.
@pytest.mark.parametrize(
    ("backend", "rule"),
    [
        ("blockwise", Causal()),
        ("strips", Causal() & SlidingWindow(9)),
        ("diagonals", Causal() & LogSparse()),
        ("splash", Causal()),
        ("rows", Causal()),
    ],
)
def test_poison_in_keys_that_only_filling_queries_see_reaches_nobody(backend, rule):
    q, k, v, c = map(np.asarray, arrays(heads=2, groups=2, queries=101, keys=128))
    hidden = np.arange(128)[:, None, None] > 100
    run = with_slopes(lambda *x: attention.attend(*x, rule, backend=backend))
    clean = run(q, k, v, c)
    assert all(np.isfinite(x).all() for x in clean)
    nan = np.float32(np.nan)
    for dirty in ((np.where(hidden, nan, k), v), (k, np.where(hidden, nan, v))):
        for mine, other in zip(run(q, *dirty, c), clean, strict=True):
            np.testing.assert_array_equal(mine, other)


def test_poison_in_padding_of_a_causal_square_reaches_no_earlier_query(attend):
    q, k, v, _ = arrays(keys=T)
    hidden = (np.arange(B)[:, None] == 0) & (np.arange(T) > 3)
    k, v = (np.where(hidden[..., None, None], np.float32(np.nan), x) for x in (k, v))
    assert np.isfinite(attend(q, k, v, Causal() & Padding(jnp.array([4, T])))).all()


def test_large_logits_do_not_overflow(attend):
    q, k, v, c = arrays()
    large = (np.asarray(x) * np.float32(1e4) for x in (q, k))
    for found in with_slopes(lambda *x: attend(*x, Causal()))(*large, v, c):
        assert np.isfinite(found).all()


def test_bfloat16_softmax_is_in_float32(attend):
    q, k, v, _ = arrays(dtype=jnp.bfloat16, keys=61)
    o = attend(q, k, np.ones_like(v))
    assert o.dtype == jnp.bfloat16
    np.testing.assert_array_equal(o, np.ones_like(o))
    exact = by_loops(q, k, v, True, (0, 0, 1, 1, 2, 2))
    assert np.abs(np.asarray(attend(q, k, v), np.float64) - exact).max() < 4e-3


def test_dropout_keeps_the_mean_and_differs_between_examples_and_heads(attend):
    rate, many = 0.25, 4001
    q, k, v = (np.ones(shape, np.float32) for shape in ((2, 1, 3, K), (2, many, 3, K), (2, many, 3, 1)))
    o = np.asarray(attend(q, k, v, dropout_rate=rate, dropout_key=jax.random.key(0)))
    assert len(np.unique(o)) == 6
    assert np.abs(o - 1).max() < 5 * np.sqrt(rate / (1 - rate) / many)


def test_dropout_depends_on_the_key_of_the_example_alone(attend):
    q, k, v, _ = arrays()
    keys = jax.random.split(jax.random.key(0), B)
    run = jax.jit(lambda *x: attend(*x[:3], dropout_rate=0.5, dropout_key=x[3]))
    both, alone = (np.asarray(run(*(x[first:] for x in (q, k, v, keys)))) for first in (0, 1))
    np.testing.assert_allclose(both[1:], alone, atol=1e-6)
    assert np.abs(both - np.asarray(attend(q, k, v))).max() > 0.1


def test_gradient_of_dropout_uses_the_bits_of_the_forward_pass(attend):
    q, k, v, c = arrays()
    run = with_slopes(lambda *x: attend(*x, Causal(), dropout_rate=0.5, dropout_key=jax.random.key(0)))
    o, _, _, gradient = run(q, k, v, c)
    np.testing.assert_allclose((gradient * np.asarray(v)).sum(), (o * np.asarray(c)).sum(), rtol=1e-4)


@pytest.mark.parametrize(
    ("heads", "groups", "queries", "keys"), [(0, 0, T, S), (0, 2, T, S), (6, 3, 0, S), (6, 3, T, 0)]
)
def test_empty_axes_are_legal(attend, heads, groups, queries, keys):
    q, k, v, c = arrays(heads, groups, queries, keys)
    o, *slopes = with_slopes(lambda *x: attend(*x, Causal()))(q, k, v, c)
    assert o.shape == (B, queries, heads, V)
    assert not any(found.any() for found in (o, *slopes))


def test_square_is_not_transposed_nor_divided():
    q, k, v, _ = arrays(queries=T, keys=T)
    text = jax.jit(lambda *x: compiled(*x, Causal(), backend="einsum")).lower(q, k, v).as_text()
    square = f"x{T}x{T}xf32"
    on_square = [line for line in text.splitlines() if square in line]
    assert on_square
    assert not [line for line in on_square if "transpose" in line or "divide" in line]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (B, T, 6)}, r"q has shape \(2, 7, 6\); it must be \[B, T, H, K\]"),
        ({"k": (3, S, 3, K)}, "B differs: 2 in q, 3 in k, 2 in v"),
        ({"q": (B, T, 6, 0), "k": (B, S, 3, 0)}, "K=0 in q and k; a head needs a width of at least 1"),
        ({"k": (B, S, 3, 4)}, "K differs: 3 in q, 4 in k"),
        ({"v": (B, 4, 3, V)}, "S differs: 5 in k, 4 in v"),
        ({"v": (B, S, 2, V)}, "G differs: 3 in k, 2 in v"),
        ({"k": (B, S, 4, K), "v": (B, S, 4, V)}, "num_heads=6 is not a multiple of num_kv_heads=4; 1, 2, 3 and 6 fit"),
        ({"head_to_group": (0, 1, 2)}, "head_to_group has 3 entries; num_heads=6"),
        ({"head_to_group": (0, 1, 2, 3, 0, 0)}, "head_to_group names group 3"),
        ({"gate": jnp.ones((T, 6))}, r"gate has shape \(7, 6\); \[H=6\]"),
        ({"dropout_rate": 0.1}, "dropout_rate=0.1 needs a dropout_key"),
        ({"dropout_rate": 1.0}, "dropout_rate=1.0 must be at least 0 and below 1"),
        ({"backend": "fast"}, "backend='fast' is not one of 'auto', 'einsum', "),
        ({"visibility": PerHead(Full(), Full())}, "visibility is for H=2; q has H=6"),
        ({"visibility": Causal() & PerHead(Full())}, "visibility is for H=1; q has H=6"),
        ({"visibility": Padding(jnp.ones(3, int))}, "visibility is for B=3; q has B=2"),
    ],
)
def test_wrong_arguments_are_refused_in_our_letters(change, message):
    arguments = dict(zip("qkv", arrays(), strict=False))
    arguments |= {name: np.ones(value, np.float32) if name in "qkv" else value for name, value in change.items()}
    with pytest.raises(UserError, match=message):
        compiled(**arguments)


def test_types_that_differ_or_are_no_floats_are_refused():
    q, k, v, _ = arrays()
    with pytest.raises(UserError, match="float32, bfloat16, float32; they must share one floating type"):
        compiled(q, k.astype(jnp.bfloat16), v)
    with pytest.raises(UserError, match="floating type"):
        compiled(*(x.astype(jnp.int32) for x in (q, k, v)))


def test_memory_of_blockwise_grows_with_the_length_and_not_with_its_square():
    def planned(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 4), jnp.float32)
        slope = jax.grad(lambda q, k, v: compiled(q, k, v, Causal(), backend="blockwise").sum(), (0, 1, 2))
        return jax.jit(slope).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert planned(8192) < 2.5 * planned(4096) < 2**24
