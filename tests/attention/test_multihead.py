import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mha_jax.attention import Causal, MultiHeadAttention, Padding, attend
from mha_jax.specs import UserError

B, T, S, D, M, H, G, K, V = 2, 7, 5, 11, 13, 6, 3, 4, 3
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
MEMORY = jnp.asarray(np.random.default_rng(1).normal(size=(B, S, M)), jnp.float32)


def layer(num_heads=H, num_kv_heads=G, seed=0, **options):
    options = {"qk_dim": K, "v_dim": V} | options
    return MultiHeadAttention(D, num_heads, num_kv_heads, **options, rngs=nnx.Rngs(seed))


@nnx.jit  # op by op, each new shape would wait for dozens of compilations
def run(module, *args, **kwargs):
    return module(*args, **kwargs)


def parameters(module):
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def with_heads(module, heads):
    """The layer that has only those heads, in that order, each with a group of its own."""
    small = layer(len(heads), len(heads))
    for name in ("query", "key", "value"):
        chosen = np.array(heads if name == "query" else [module.shape.groups[h] for h in heads], int)
        getattr(small, name).kernel[...] = np.asarray(getattr(module, name).kernel[...])[:, chosen]
    small.out.kernel[...] = np.asarray(module.out.kernel[...])[np.array(heads, int)]
    return small


def test_parameters_have_the_names_and_axes_of_the_design():
    module = layer(use_bias=True, memory_dim=M)
    assert {name: leaf.shape for name, leaf in parameters(module).items()} == {
        "query.kernel": (D, H, K),
        "key.kernel": (M, G, K),
        "value.kernel": (M, G, V),
        "out.kernel": (H, V, D),
        "query.bias": (H, K),
        "key.bias": (G, K),
        "value.bias": (G, V),
        "out.bias": (D,),
    }
    np.testing.assert_array_equal(module.gate[...], np.ones(H))


def test_layer_is_projections_around_attend():
    module = layer(use_bias=True, memory_dim=M)
    for bias in (module.query.bias, module.key.bias, module.value.bias, module.out.bias):
        bias[...] = jnp.asarray(np.random.default_rng(5).normal(size=bias.shape), jnp.float32)
    project = lambda x, p: np.einsum("bsm,mgk->bsgk", x, p.kernel[...]) + np.asarray(p.bias[...])  # noqa: E731
    o = jax.jit(attend)(*(project(*pair) for pair in ((X, module.query), (MEMORY, module.key), (MEMORY, module.value))))
    expected = np.einsum("bthv,hvd->btd", o, module.out.kernel[...]) + np.asarray(module.out.bias[...])
    np.testing.assert_allclose(run(module, X, MEMORY), expected, atol=1e-5)


def test_layer_is_the_sum_of_its_single_head_layers():
    module = layer()
    total = sum(np.asarray(run(with_heads(module, [h]), X, visibility=Causal())) for h in range(H))
    np.testing.assert_allclose(run(module, X, visibility=Causal()), total, atol=1e-5)


def test_order_of_heads_does_not_matter():
    module = layer()
    np.testing.assert_allclose(run(module, X), run(with_heads(module, [4, 0, 5, 2, 1, 3]), X), atol=1e-5)


@pytest.mark.parametrize("head", [0, 3])
def test_gate_zero_is_a_zeroed_head_of_out(head):
    module, gate = layer(), jnp.ones(H).at[head].set(0)
    by_argument = run(module, X, gate=gate)
    module.gate[...] = gate
    by_variable = run(module, X)
    module.gate[...] = jnp.ones(H)
    full = run(module, X)
    module.out.kernel[...] = module.out.kernel[...].at[head].set(0)
    np.testing.assert_allclose(by_argument, run(module, X), atol=1e-6)
    np.testing.assert_allclose(by_variable, run(module, X), atol=1e-6)
    assert np.abs(full - by_argument).max() > 1e-2


@pytest.mark.parametrize("shape", [(H,), (B, H), (B, T, H)])
def test_gate_argument_multiplies_on_top_of_the_layers_own(shape):
    module, gate = layer(), np.random.default_rng(3).normal(size=shape).astype(np.float32)
    own = np.arange(1, H + 1, dtype=np.float32)
    module.gate[...] = jnp.asarray(own)
    product = np.broadcast_to(gate[:, None] if gate.ndim == 2 else gate, (B, T, H)) * own
    both = run(module, X, gate=gate)
    module.gate[...] = jnp.ones(H)
    np.testing.assert_allclose(both, run(module, X, gate=product), atol=1e-5)


def test_hidden_keys_have_exactly_zero_gradient():
    module, rule = layer(memory_dim=M), Padding(jnp.array([3, 0]))
    gradient = np.asarray(jax.jit(jax.grad(lambda memory: module(X, memory, visibility=rule).sum()))(MEMORY))
    assert (gradient[0, 3:] == 0).all()
    assert (gradient[1] == 0).all()
    assert (gradient[0, :3] != 0).all()
    np.testing.assert_array_equal(run(module, X, MEMORY, visibility=rule)[1], np.zeros((T, D)))


def test_dropout_happens_only_where_a_key_is_given():
    module = layer(dropout_rate=0.5)
    still = np.asarray(run(module, X))
    np.testing.assert_array_equal(still, run(layer(dropout_rate=0.0), X))
    first, again, other = (np.asarray(run(module, X, dropout_key=jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-2
    assert np.abs(first - still).max() > 1e-2


def test_layer_with_zero_heads_is_legal():
    np.testing.assert_array_equal(run(layer(0, None), X, visibility=Causal()), np.zeros((B, T, D)))
    module = layer(0, None, use_bias=True)
    module.out.bias[...] = jnp.arange(1.0, D + 1)
    np.testing.assert_array_equal(run(module, X), np.broadcast_to(np.arange(1.0, D + 1), (B, T, D)))
    assert parameters(module)["query.kernel"].shape == (D, 0, K)


def test_pieces_of_decoding_give_the_whole():
    module = layer(rope=True)

    @nnx.jit
    def row(module, t):
        k, v = module.keys_values(X)
        q = module.queries(jax.lax.dynamic_slice_in_dim(X, t, 1, axis=1), t[None])
        return module.output(attend(q, k, v, Padding(jnp.full(B, t + 1))))

    rows = [np.asarray(row(module, jnp.array(t))) for t in range(T)]
    np.testing.assert_allclose(np.concatenate(rows, 1), run(module, X, visibility=Causal()), atol=1e-5)


def test_rope_sees_distances_alone():
    module = layer(rope=True)
    near, far = (np.asarray(run(module, X, visibility=Causal(), positions=np.arange(T) + shift)) for shift in (0, 50))
    np.testing.assert_allclose(near, far, atol=1e-4)
    assert np.abs(near - np.asarray(run(layer(), X, visibility=Causal()))).max() > 1e-2


def test_ragged_map_reads_the_groups_it_names():
    groups = (2, 0, 2, 1, 1)
    module = layer(5, 3, head_to_group=groups)
    np.testing.assert_allclose(run(module, X), run(with_heads(module, range(5)), X), atol=1e-5)


def test_shared_start_is_the_same_matrices_whatever_the_heads():
    def start(heads):
        module = MultiHeadAttention(16, heads, init="shared", rngs=nnx.Rngs(7))
        kernels = parameters(module)
        return [kernels[f"{name}.kernel"].reshape(16, 16) for name in ("query", "key", "value", "out")]

    for heads in (2, 4, 16):
        for one, other in zip(start(1), start(heads), strict=True):
            np.testing.assert_array_equal(one, other)
    distinct = [np.asarray(matrix)[0, 0] for matrix in start(1)]
    assert len(set(distinct)) == 4


def test_shared_start_of_fewer_groups_is_the_first_columns():
    wide, narrow = (MultiHeadAttention(16, 4, g, init="shared", rngs=nnx.Rngs(7)) for g in (4, 2))
    np.testing.assert_array_equal(wide.key.kernel[...][:, :2], narrow.key.kernel[...])


def test_independent_starts_differ_between_head_counts():
    one, two = (MultiHeadAttention(16, h, rngs=nnx.Rngs(7)).query.kernel[...].reshape(16, 16) for h in (1, 2))
    assert np.abs(one - two).min() > 0


@pytest.mark.parametrize("init", ["independent", "shared"])
def test_kernels_are_glorot_uniform(init):
    module = MultiHeadAttention(96, 4, 2, init=init, rngs=nnx.Rngs(3))
    for name, fan_in, fan_out in (("query", 96, 96), ("key", 96, 48), ("out", 96, 96)):
        limit = np.sqrt(6 / (fan_in + (96 if init == "shared" else fan_out)))
        kernel = np.asarray(getattr(module, name).kernel[...])
        assert limit * 0.99 < np.abs(kernel).max() <= limit
        assert abs(kernel.std() - limit / np.sqrt(3)) < 0.02 * limit


def test_number_of_heads_does_not_shift_what_later_layers_draw():
    draws = []
    for heads in (0, 1, 3):
        rngs = nnx.Rngs(0)
        MultiHeadAttention(D, heads, qk_dim=K, v_dim=V, rngs=rngs)
        draws.append(jax.random.key_data(rngs.params()).tolist())
    assert draws[0] == draws[1] == draws[2]


def test_jit_and_vmap_over_seeds_equal_the_seeds_one_by_one():
    modules = [layer(seed=seed) for seed in range(2)]
    graph = nnx.split(modules[0])[0]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.state(module) for module in modules))

    @jax.jit
    @jax.value_and_grad
    def slopes(state):
        return (nnx.merge(graph, state)(X, visibility=Causal()) ** 2).sum()

    values, gradients = jax.vmap(slopes)(stacked)
    for seed, module in enumerate(modules):
        value, gradient = slopes(nnx.state(module))
        np.testing.assert_allclose(values[seed], value, rtol=1e-5)
        for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(one[seed], other, atol=1e-4)


def test_bfloat16_computes_in_bfloat16_on_float32_parameters():
    module = layer(dtype=jnp.bfloat16)
    y = run(module, X, visibility=Causal())
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in parameters(module).values()} == {jnp.dtype("float32")}
    np.testing.assert_allclose(np.asarray(y, np.float32), run(layer(), X, visibility=Causal()), atol=3e-2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layer(4, qk_dim=None), "d_model=11 is not a multiple of num_heads=4; 1 and 11 fit"),
        (lambda: layer(6, 4), "num_heads=6 is not a multiple of num_kv_heads=4"),
        (lambda: layer(rope=True, qk_dim=3), "qk_dim=3 must be even"),
        (lambda: layer(backend="fast"), "backend='fast' is not one of"),
        (lambda: layer(dropout_rate=1.5), "dropout_rate=1.5 must be at least 0 and below 1"),
        (lambda: layer(rope=True, rope_base=-1.0), "rope_base=-1.0 must be positive"),
        (lambda: layer(init="shared"), "6 heads of width 4 need 24"),
        (lambda: layer()(X[..., :-1]), r"x has shape \(2, 7, 10\); its last of three axes must be D=11"),
        (lambda: layer()(X, MEMORY), r"memory has shape \(2, 5, 13\); its last of three axes must be M=11"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
