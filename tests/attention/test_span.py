"""Adaptive spans: the weights are those of the definition, spans learn, and windows hide only what weighs nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mha_jax.attention import Causal, MultiHeadAttention, Padding, noting_backends
from mha_jax.attention.blockmap import BlockMap
from mha_jax.attention.span import AdaptiveSpan
from mha_jax.specs import SpanSpec

B, T, H, G, K, V, D = 2, 11, 4, 2, 3, 5, 7
SPEC = SpanSpec(max_span=8, ramp=3)
FRACTIONS = (0.0, 0.2, 0.55, 1.0)


@pytest.fixture
def double():
    with jax.enable_x64(True):
        span = AdaptiveSpan(SPEC, H, param_dtype=jnp.float64)
        span.fraction[...] = jnp.array(FRACTIONS)
        rng = np.random.default_rng(0)
        shapes = ((B, T, H, K), (B, T, G, K), (B, T, G, V))
        yield span, [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def defined(q, k, v, z, visible):
    """One example and head, key by key."""
    out = np.zeros((len(q), v.shape[-1]))
    for t in range(len(q)):
        weights = np.zeros(len(k))
        for s in range(len(k)):
            mask = min(max((SPEC.ramp + z - abs(t - s)) / SPEC.ramp, 0), 1)
            weights[s] = visible[t, s] * mask * np.exp(q[t] @ k[s] / np.sqrt(K))
        out[t] = weights @ v / weights.sum() if weights.sum() > 0 else 0
    return out


@nnx.jit  # op by op, each new shape would wait for dozens of compilations
def attended(span, q, k, v, rule):
    return span.attend(q, k, v, rule, groups=(0, 0, 1, 1))


@nnx.jit
def run(module, x):
    return module(x, visibility=Causal())


@pytest.mark.parametrize("rule", [Causal(), Padding(jnp.array([11, 6]))], ids=["causal", "padding"])
def test_attention_within_spans_is_the_definition(double, rule):
    span, (q, k, v) = double
    with noting_backends() as notes:
        o = np.asarray(attended(span, q, k, v, rule))
    assert notes == ["T=11 S=11 H=4 G=2 K=3 V=5 float64: einsum (adaptive span)"]
    visible = np.broadcast_to(rule.mask(T, T), (B, 1, T, T))
    q, k, v = map(np.asarray, (q, k, v))
    for b, h in np.ndindex(B, H):
        g = h // 2
        wanted = defined(q[b, :, h], k[b, :, g], v[b, :, g], SPEC.max_span * FRACTIONS[h], visible[b, 0])
        # Tolerance: float64 rounding of sums of 11; a ramp off by one key shows at 1e-2.
        np.testing.assert_allclose(o[b, :, h], wanted, atol=1e-13)


def test_gradients_of_spans_are_those_of_differences(double):
    span, (q, k, v) = double
    graph, state = nnx.split(span)

    @jax.jit
    def loss(fraction):
        moved = nnx.merge(graph, jax.tree.map(lambda _: fraction, state))
        return jnp.sum(jnp.sin(moved.attend(q, k, v, Causal(), groups=(0, 0, 1, 1))))

    # Off the places where a key enters or leaves the ramp, at which the mask has a corner.
    fraction, step = jnp.array([0.03, 0.2, 0.55, 0.9]) + 0.011, 1e-6
    gradient = jax.jit(jax.grad(loss))(fraction)
    for h in range(H):
        nudge = step * np.eye(H)[h]
        difference = (loss(fraction + nudge) - loss(fraction - nudge)) / (2 * step)
        np.testing.assert_allclose(gradient[h], difference, rtol=1e-6, atol=1e-9)


def test_a_fraction_out_of_range_counts_as_the_end_and_moves_only_back():
    span = AdaptiveSpan(SPEC, 4, param_dtype=jnp.float32)
    graph, state = nnx.split(span)

    def weighted(fraction, weights):
        return jnp.sum(weights * nnx.merge(graph, jax.tree.map(lambda _: fraction, state)).lengths())

    fraction = jnp.array([-0.1, -0.1, 1.2, 1.2])
    # A step goes against the gradient: +1 pushes down, -1 up.
    gradient = jax.grad(weighted)(fraction, jnp.array([1.0, -1.0, 1.0, -1.0]))
    np.testing.assert_array_equal(gradient, [0, -8, 8, 0])
    span.fraction[...] = fraction
    np.testing.assert_array_equal(span.lengths(), [0, 0, 8, 8])


def test_windows_hide_exactly_what_weighs_nothing(double):
    span, (q, k, v) = double
    assert span.windows() == (3, 5, 8, 11)
    mask = np.asarray(span.mask(jnp.arange(T), jnp.arange(T)))
    np.testing.assert_array_equal(mask > 0, span.rule().mask(T, T)[0])
    within, whole = (attended(span, q, k, v, rule) for rule in (Causal() & span.rule(), Causal()))
    np.testing.assert_allclose(within, whole, atol=1e-14)


def test_the_rule_of_short_spans_pays_for_few_tiles():
    span = AdaptiveSpan(SpanSpec(max_span=512, ramp=32), 2, param_dtype=jnp.float32)
    span.fraction[...] = jnp.array([0.0, 1.0])
    paid = BlockMap.of(Causal() & span.rule(), 512, 512, 64, 64).paid
    whole = BlockMap.of(Causal(), 512, 512, 64, 64).paid
    # Eight rows of tiles: one head pays for 1 + 7 * 2 tiles, the other for all 36.
    assert paid / whole == pytest.approx((15 + 36) / (2 * 36))


@pytest.mark.slow
def test_a_layer_with_spans_over_everything_is_the_plain_layer():
    make = functools.partial(MultiHeadAttention, D, H, G, K, V)
    wide = make(adaptive_span=SpanSpec(max_span=T, ramp=1, init=1.0), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, D)), jnp.float32)
    # Tolerance: float32 sums; the paths may order them otherwise.
    np.testing.assert_allclose(run(wide, x), run(make(rngs=nnx.Rngs(0)), x), atol=1e-6)
    narrow = make(adaptive_span=SpanSpec(max_span=T, ramp=1), rngs=nnx.Rngs(0))
    assert np.abs(np.asarray(run(narrow, x)) - np.asarray(run(wide, x))).max() > 1e-2
