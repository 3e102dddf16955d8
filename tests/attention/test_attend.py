import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax import attention
from mha_jax.attention import BACKENDS, Causal, Dense, Full, LogSparse, Padding, PerHead, SlidingWindow, noting_backends
from mha_jax.attention.attend import _PREFERRED, choose_backend, fell_back
from mha_jax.attention.backends.call import Call
from mha_jax.specs import UserError
from mha_jax.specs.model import BACKENDS as NAMES

B, T, S, K, V = 2, 7, 5, 3, 11
# Compiled whole: op by op, each small test would wait for dozens of compilations.
compiled = jax.jit(attention.attend, static_argnames=("dropout_rate", "head_to_group", "backend"))


@pytest.fixture(params=["einsum", pytest.param("blockwise", marks=pytest.mark.slow)])
def attend(request):
    return functools.partial(compiled, backend=request.param)


def arrays(heads=6, groups=3, queries=T, keys=S, dtype=jnp.float32, v_dim=V):
    shapes = (B, queries, heads, K), (B, keys, groups, K), (B, keys, groups, v_dim), (B, queries, heads, v_dim)
    return [jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)]


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


def gradients(function, q, k, v, c):
    return jax.jit(jax.grad(lambda q, k, v: (function(q, k, v) * c).sum(), (0, 1, 2)))(q, k, v)


@pytest.mark.parametrize("groups", [6, 3, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (Full(), {}),
        (Causal(), {"is_causal": True}),
        (Causal() & Padding(jnp.array([2, 5])), {"is_causal": True, "key_value_seq_lengths": jnp.array([2, 5])}),
    ],
)
def test_outputs_and_gradients_match_jax_nn(attend, groups, rule, options):
    q, k, v, c = arrays(6, groups, v_dim=K)
    ours, theirs = jax.jit(lambda *x: attend(*x, rule)), jax.jit(lambda *x: jax.nn.dot_product_attention(*x, **options))
    np.testing.assert_allclose(ours(q, k, v), theirs(q, k, v), atol=1e-5)
    for mine, other in zip(gradients(ours, q, k, v, c), gradients(theirs, q, k, v, c), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)


@pytest.mark.parametrize("gate_shape", [(4,), (B, 4), (B, T, 4)])
def test_ragged_groups_and_gates_match_the_definition(attend, gate_shape):
    q, k, v, _ = arrays(4, 3)
    groups, gate = (2, 0, 2, 1), jax.random.normal(jax.random.key(9), gate_shape)
    rule = PerHead(Causal(), Full(), Padding(jnp.array([2, 0])), Causal(-2))
    o = attend(q, k, v, rule, gate=gate, scale=0.7, head_to_group=groups)
    full_gate = np.broadcast_to(gate[:, None] if gate.ndim == 2 else gate, (B, T, 4))
    np.testing.assert_allclose(o, by_loops(q, k, v, rule.mask(T, S), groups, full_gate, 0.7), atol=1e-5)


@pytest.mark.parametrize("groups", [6, 3, 1], ids=["mha", "gqa", "mqa"])
def test_float64_matches_the_definition_and_its_finite_differences(attend, groups):
    with jax.enable_x64(True):
        q, k, v, c = arrays(6, groups, dtype=jnp.float64)
        visible = np.asarray(jax.random.bernoulli(jax.random.key(7), 0.6, (B, 6, T, S)))
        heads = [h // (6 // groups) for h in range(6)]
        o = attend(q, k, v, Dense(visible))
        assert o.dtype == jnp.float64
        np.testing.assert_allclose(o, by_loops(q, k, v, visible, heads), atol=1e-12)
        slopes = gradients(lambda *x: attend(*x, Dense(visible)), q, k, v, c)
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

    @jax.jit
    def function(*x):
        return attend(*x, Dense(visible), head_to_group=head_to_group)

    assert (np.asarray(function(q, k, v))[empty] == 0).all()
    # In an empty row even a NaN query reaches nobody.
    dirty = gradients(function, jnp.where(empty[..., None], jnp.nan, q), k, v, c)
    for mine, clean in zip(dirty, gradients(function, q, k, v, c), strict=True):
        np.testing.assert_array_equal(mine, clean)
    assert (np.asarray(dirty[0])[empty] == 0).all()


@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("head_to_group", [None, (0, 2, 2, 0, 1, 0)], ids=["regular", "ragged"])
def test_poison_in_keys_that_nobody_sees_reaches_nobody(attend, poison, head_to_group):
    q, k, v, c = arrays()
    groups = head_to_group or (0, 0, 1, 1, 2, 2)
    visible = np.asarray(jax.random.bernoulli(jax.random.key(7), 0.5, (B, 6, T, S))).copy()
    visible[0, :, :, 1] = False
    visible[1, [h for h in range(6) if groups[h] == 2], :, 4] = False
    hidden = np.zeros((B, S, 3, 1), bool)
    hidden[0, 1], hidden[1, 4, 2] = True, True

    @jax.jit
    def function(*x):
        return attend(*x, Dense(visible), head_to_group=head_to_group)

    dirty = q, jnp.where(hidden, poison, k), jnp.where(hidden, poison, v)
    np.testing.assert_array_equal(function(*dirty), function(q, k, v))
    assert np.isfinite(function(*dirty)).all()
    for mine, clean in zip(gradients(function, *dirty, c), gradients(function, q, k, v, c), strict=True):
        np.testing.assert_array_equal(mine, clean)
    for gradient in gradients(function, *dirty, c)[1:]:
        assert (np.asarray(gradient)[hidden[..., 0]] == 0).all()


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
    q, k, v, c = arrays(heads=2, groups=2, queries=101, keys=128)
    hidden = np.arange(128)[:, None, None] > 100
    function = jax.jit(lambda *x: attention.attend(*x, rule, backend=backend))
    for x, y in ((jnp.nan, 0.0), (0.0, jnp.nan)):
        dirty = q, jnp.where(hidden, k + x, k), jnp.where(hidden, v + y, v)
        np.testing.assert_array_equal(function(*dirty), function(q, k, v))
        for mine, clean in zip(gradients(function, *dirty, c), gradients(function, q, k, v, c), strict=True):
            np.testing.assert_array_equal(mine, clean)


def test_poison_in_padding_of_a_causal_square_reaches_no_earlier_query(attend):
    q, k, v, _ = arrays(keys=T)
    k, v = k.at[0, 4:].set(jnp.nan), v.at[0, 4:].set(jnp.nan)
    assert np.isfinite(attend(q, k, v, Causal() & Padding(jnp.array([4, T])))).all()


def test_large_logits_do_not_overflow(attend):
    q, k, v, c = arrays()
    assert np.isfinite(attend(q * 1e4, k * 1e4, v, Causal())).all()
    for gradient in gradients(lambda *x: attend(*x, Causal()), q * 1e4, k * 1e4, v, c):
        assert np.isfinite(gradient).all()


def test_bfloat16_softmax_is_in_float32(attend):
    q, k, v, _ = arrays(dtype=jnp.bfloat16, keys=61)
    o = attend(q, k, jnp.ones_like(v))
    assert o.dtype == jnp.bfloat16
    np.testing.assert_array_equal(o, jnp.ones_like(o))
    exact = by_loops(*(x.astype(jnp.float32) for x in (q, k, v)), True, (0, 0, 1, 1, 2, 2))
    assert np.abs(np.asarray(attend(q, k, v), np.float64) - exact).max() < 4e-3


def test_dropout_keeps_the_mean_and_differs_between_examples_and_heads(attend):
    rate, many = 0.25, 4001
    q, k, v = jnp.ones((2, 1, 3, K)), jnp.ones((2, many, 3, K)), jnp.ones((2, many, 3, 1))
    o = np.asarray(attend(q, k, v, dropout_rate=rate, dropout_key=jax.random.key(0)))
    assert len(np.unique(o)) == 6
    assert np.abs(o - 1).max() < 5 * np.sqrt(rate / (1 - rate) / many)


def test_dropout_depends_on_the_key_of_the_example_alone(attend):
    q, k, v, _ = arrays()
    keys = jax.random.split(jax.random.key(0), B)
    both = attend(q, k, v, dropout_rate=0.5, dropout_key=keys)
    alone = attend(q[1:], k[1:], v[1:], dropout_rate=0.5, dropout_key=keys[1:])
    np.testing.assert_allclose(both[1:], alone, atol=1e-6)
    assert np.abs(both - attend(q, k, v)).max() > 0.1


def test_gradient_of_dropout_uses_the_bits_of_the_forward_pass(attend):
    q, k, v, c = arrays()
    function = lambda v: attend(q, k, v, Causal(), dropout_rate=0.5, dropout_key=jax.random.key(0))  # noqa: E731
    gradient = jax.grad(lambda v: (function(v) * c).sum())(v)
    np.testing.assert_allclose((gradient * v).sum(), (function(v) * c).sum(), rtol=1e-4)


@pytest.mark.parametrize(
    ("heads", "groups", "queries", "keys"), [(0, 0, T, S), (0, 2, T, S), (6, 3, 0, S), (6, 3, T, 0)]
)
def test_empty_axes_are_legal(attend, heads, groups, queries, keys):
    q, k, v, c = arrays(heads, groups, queries, keys)
    o = attend(q, k, v, Causal())
    assert o.shape == (B, queries, heads, V)
    assert not o.any()
    assert not any(g.any() for g in gradients(lambda *x: attend(*x, Causal()), q, k, v, c))


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
    arguments |= {name: jnp.ones(value) if name in "qkv" else value for name, value in change.items()}
    with pytest.raises(UserError, match=message):
        compiled(**arguments)


def test_types_that_differ_or_are_no_floats_are_refused():
    q, k, v, _ = arrays()
    with pytest.raises(UserError, match="float32, bfloat16, float32; they must share one floating type"):
        compiled(q, k.astype(jnp.bfloat16), v)
    with pytest.raises(UserError, match="floating type"):
        compiled(*(x.astype(jnp.int32) for x in (q, k, v)))


def call(queries=T, keys=S, rate=0.0):
    return Call(B, queries, keys, 6, (0, 0, 1, 1, 2, 2), 3, K, V, jnp.dtype("float32"), Causal(), rate)


def test_auto_takes_the_reference_for_small_squares_and_never_for_large_ones():
    assert choose_backend("auto", call()).name == "einsum"
    assert choose_backend("auto", call(4096, 4096, 0.1)).name == "blockwise"


def test_auto_takes_diagonals_where_tiles_would_pay_for_much_more():
    for rule, length, name in (
        (Causal() & LogSparse(), 4096, "diagonals"),
        (LogSparse(), 2**15 + 1, "diagonals"),
        (SlidingWindow(5, dilation=64), 4096, "diagonals"),
        (SlidingWindow(64), 4096, "strips"),
        (Causal() & LogSparse() & Padding(jnp.array([5, 7])), 4096, "blockwise"),
    ):
        assert choose_backend("auto", dataclasses.replace(call(length, length), rule=rule)).name == name


def test_auto_says_who_refused_and_why(monkeypatch):
    monkeypatch.setitem(_PREFERRED, "cpu", ("picky", "blockwise"))
    monkeypatch.setitem(BACKENDS, "picky", types.SimpleNamespace(refusal=lambda call: "K=3 is odd; even K would do"))
    x = jnp.ones((1, 1031, 2, 3))
    with noting_backends() as notes:
        for _ in range(2):
            attention.attend(x, x, x)
    assert notes == ["T=1031 S=1031 H=2 G=2 K=3 V=3 float32: blockwise; picky: K=3 is odd; even K would do"]
    assert fell_back(notes[0])


def test_backend_that_is_named_and_refuses_is_an_error_with_the_reason(monkeypatch):
    monkeypatch.setitem(BACKENDS, "picky", types.SimpleNamespace(refusal=lambda call: "K=3 is odd; even K would do"))
    x = jnp.ones((1, 5, 2, 3))
    with pytest.raises(UserError, match="backend='picky' cannot serve this attention: K=3 is odd; even K would do"):
        attention.attend(x, x, x, backend="picky")


def test_a_config_names_the_backends_that_there_are():
    assert ("auto", *BACKENDS) == NAMES


def test_memory_of_blockwise_grows_with_the_length_and_not_with_its_square():
    def planned(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 4), jnp.float32)
        slope = jax.grad(lambda q, k, v: compiled(q, k, v, Causal(), backend="blockwise").sum(), (0, 1, 2))
        return jax.jit(slope).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert planned(8192) < 2.5 * planned(4096) < 2**24
