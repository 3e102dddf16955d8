"""Routers: their gates are those of the papers, as many heads are used as they say, and gradients reach them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import softmax

from mha_jax.attention import Causal, MultiHeadAttention
from mha_jax.attention.gathered import gathered_attention
from mha_jax.attention.routing import Router, routes
from mha_jax.specs import HeadShape, RoutingSpec, UserError

B, T, D, H, K, V = 2, 7, 11, 5, 4, 3
KEY = jax.random.key(9)
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
MOH = RoutingSpec(kind="moh", shared=2, top_k=2)
KINDS = {
    "moh": MOH,
    "moh, nothing shared": RoutingSpec(kind="moh", top_k=3),
    "moa": RoutingSpec(kind="moa", top_k=2),
}


gathered = nnx.jit(gathered_attention, static_argnums=3)


@nnx.jit  # op by op, each new shape would wait for dozens of compilations
def run(module, *args, **kwargs):
    return module(*args, **kwargs)


def layer(routing, **options):
    groups = 1 if routing.kind == "moa" else None
    return MultiHeadAttention(D, H, groups, K, V, routing=routing, **options, rngs=nnx.Rngs(3))


def expected_gate(spec, kernel, x):
    """The gate of one token, written out."""
    shared, logits = spec.shared, np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    probabilities = softmax(logits[shared:H])
    chosen = np.zeros(H - shared)
    chosen[np.argsort(-probabilities)[: spec.top_k]] = 1
    share = chosen * probabilities / (chosen * probabilities).sum()
    if spec.kind == "moa":
        return share
    if not shared:
        return spec.top_k * share
    parts = 2 * softmax(logits[H:])
    return np.concatenate([parts[0] * shared * softmax(logits[:shared]), parts[1] * spec.top_k * share])


@pytest.mark.parametrize("name", KINDS)
def test_the_gate_is_the_papers_and_is_above_0_for_the_heads_in_use_only(name):
    spec = KINDS[name]
    router = layer(spec).router
    assert router is not None
    route = jax.device_get(run(router, X))
    kernel = np.asarray(router.kernel[...])
    for b, t in np.ndindex(B, T):
        wanted = expected_gate(spec, kernel, np.asarray(X)[b, t])
        # Tolerance: float32 softmaxes differ by a few 1e-7; a factor left out shows at 1e-1.
        np.testing.assert_allclose(route.gate_BTH[b, t], wanted, atol=2e-6)
    assert ((route.gate_BTH > 0).sum(-1) == spec.active).all()
    assert (route.chosen_BTE.sum(-1) == spec.top_k).all()


def test_of_equal_heads_the_first_are_chosen():
    router = layer(MOH).router
    assert router is not None
    router.kernel[...] = jnp.zeros_like(router.kernel[...])
    np.testing.assert_array_equal(run(router, X).chosen_BTE[0, 0], [True, True, False])


@pytest.mark.parametrize("name", KINDS)
def test_a_routed_layer_is_the_plain_one_with_the_routers_gate(name):
    routed, plain = layer(KINDS[name]), layer(RoutingSpec())
    if KINDS[name].kind == "moa":
        plain = MultiHeadAttention(D, H, 1, K, V, rngs=nnx.Rngs(3))
    assert routed.router is not None
    gate = run(routed.router, X).gate_BTH
    # The same seed draws the same matrices with and without a router, so the outputs are the same numbers.
    np.testing.assert_array_equal(run(routed, X, visibility=Causal()), run(plain, X, visibility=Causal(), gate=gate))
    half = np.arange(H, dtype=np.float32) / H
    np.testing.assert_allclose(
        run(routed, X, visibility=Causal(), gate=half),
        run(plain, X, visibility=Causal(), gate=np.asarray(gate) * half),
        atol=1e-6,
    )


def test_gradients_of_the_router_are_those_of_differences():
    with jax.enable_x64(True):
        graph, state = nnx.split(Router(MOH, D, HeadShape.resolve(D, H, H, K, V), key=KEY, param_dtype=jnp.float64))
        kernel, x = jax.tree.leaves(state)[0], jnp.asarray(X, jnp.float64)

        @jax.jit
        def loss(kernel):
            gate = nnx.merge(graph, jax.tree.map(lambda _: kernel, state))(x).gate_BTH
            return jnp.sum(jnp.sin(gate * jnp.arange(1.0, H + 1).reshape(1, 1, H)))

        direction, step = np.random.default_rng(9).normal(size=kernel.shape), 1e-6
        difference = (loss(kernel + step * direction) - loss(kernel - step * direction)) / (2 * step)
        # Tolerance: central differences err by step**2 and rounding / step, 1e-9 here.
        np.testing.assert_allclose(np.vdot(jax.jit(jax.grad(loss))(kernel), direction), difference, rtol=1e-6)


def test_a_single_chosen_moa_head_has_factor_1_and_still_teaches_its_router():
    graph, state = nnx.split(
        Router(RoutingSpec(kind="moa"), D, HeadShape.resolve(D, H, 1, K, V), key=KEY, param_dtype=jnp.float32)
    )

    def weighted(state):
        gate = nnx.merge(graph, state)(X).gate_BTH
        return jnp.sum(gate * jnp.arange(H).reshape(1, 1, H)), gate

    slope, gate = jax.jit(jax.grad(weighted, has_aux=True))(state)
    np.testing.assert_allclose(np.asarray(gate).max(-1), 1)
    assert float(jnp.abs(jax.tree.leaves(slope)[0]).max()) > 1e-2


def test_routes_are_collected_in_order_and_only_where_asked_for():
    first, second = layer(MOH), layer(KINDS["moa"])

    def call(x):
        first(x)
        with routes() as found:
            second(first(x))
        return found

    found = jax.eval_shape(call, X)
    assert [route.scores_BTE.shape[-1] for route in found] == [3, 5]


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_gathered_heads_are_the_gated_ones_where_all_fit(name):
    module = layer(KINDS[name])
    y, left_out = gathered(module, X, Causal(), T)
    # Tolerance: the same sums in another order, of numbers near 1.
    np.testing.assert_allclose(y, run(module, X, visibility=Causal()), atol=2e-6)
    assert float(left_out) == 0


@pytest.mark.slow
def test_gathering_leaves_out_the_last_uses_beyond_the_capacity():
    module = layer(KINDS["moa"])
    assert module.router is not None
    used = np.asarray(run(module.router, X).chosen_BTE).sum(axis=1)
    y, left_out = gathered(module, X, Causal(), 2)
    assert float(left_out) == pytest.approx(np.maximum(used - 2, 0).sum() / used.sum())
    # What earlier tokens get does not depend on later ones.
    shorter, _ = gathered(module, X[:, :4], Causal(), 2)
    np.testing.assert_allclose(np.asarray(y)[:, :4], shorter, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "capacity", "message"),
    [
        ({"routing": RoutingSpec()}, 3, "needs a layer with a router"),
        ({"routing": MOH, "rope": True}, 3, "without adaptive spans, rope and biases"),
        ({"routing": MOH}, T + 1, f"capacity=8 must be between 1 and the {T} tokens"),
    ],
)
def test_what_cannot_be_gathered_is_told(options, capacity, message):
    with pytest.raises(UserError, match=message):
        gathered_attention(layer(**options), X, Causal(), capacity)


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (RoutingSpec(kind="moh", top_k=6), (5, None), r"top_k=6 is more than the 5 routed heads .*; at most 5 fit"),
        (
            RoutingSpec(kind="moh", shared=2, top_k=4),
            (5, None),
            r"more than the 3 routed heads \(num_heads=5, shared=2\)",
        ),
        (
            RoutingSpec(kind="moh", shared=5),
            (5, None),
            "shared=5 leaves no head to route: num_heads=5 allows at most 4",
        ),
        (RoutingSpec(kind="moa", top_k=2), (5, None), "num_kv_heads=5 must be 1"),
    ],
)
def test_routing_that_does_not_fit_the_heads_is_refused(spec, shape, message):
    with pytest.raises(UserError, match=message):
        spec.check(HeadShape.resolve(10, *shape))
