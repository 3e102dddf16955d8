"""Heads that are the same are found to be, whatever basis they are written in; heads that share nothing are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import nnx

from mha_jax.attention import Causal, Full, MultiHeadAttention
from mha_jax.attention.statistics import attention_weights
from mha_jax.heads import attentions
from mha_jax.heads.capture import Attended
from mha_jax.heads.overlap import weight_overlap
from mha_jax.heads.similarity import (
    MEASURES,
    _attention_sums,
    _estimate,
    _written_sums,
    cka,
    compare,
    cosines,
    jackknife,
    kinds_of,
)
from mha_jax.models import build_model
from mha_jax.specs import UserError
from tests import tiny

# float32 sums of a few hundred products: rounding is about 1e-6; the JS distance is the root of such a difference.
ATOL = 1e-4


def make_model(task="lm", **overrides):
    spec = tiny.run(task, **overrides)
    return nnx.jit(lambda: build_model(spec, rngs=nnx.Rngs(0)))()


def make_batches(task="lm", count=3):
    spec = tiny.run(task)
    return [{name: jnp.asarray(x[0]) for name, x in batch.items()} for batch in tiny.batches(spec, count)]


def copy_head(layer, source, target):
    for kernel in (layer.query.kernel, layer.key.kernel, layer.value.kernel):
        kernel[...] = kernel[...].at[:, target].set(kernel[...][:, source])
    layer.out.kernel[...] = layer.out.kernel[...].at[target].set(layer.out.kernel[...][source])


@pytest.fixture(scope="module")
def planted():
    """Six heads, of which the first four times: as it is, in another basis inside, and writing it turned and scaled."""
    model, rng = make_model(model__num_layers=1, model__num_heads=6), np.random.default_rng(0)
    layer = attentions(model)["decoder/0/attention"]
    for head in (1, 2, 3):
        copy_head(layer, 0, head)
    inside = rng.normal(size=(5, 5))
    layer.value.kernel[...] = layer.value.kernel[...].at[:, 2].set(layer.value.kernel[...][:, 2] @ inside)
    layer.out.kernel[...] = layer.out.kernel[...].at[2].set(np.linalg.inv(inside) @ layer.out.kernel[...][2])
    turned = 3 * layer.out.kernel[...][3] @ scipy.linalg.qr(rng.normal(size=(12, 12)))[0]
    layer.out.kernel[...] = layer.out.kernel[...].at[3].set(turned)
    return compare(model, make_batches(count=2), tuple(MEASURES))["decoder"]


def test_heads_are_listed_layer_by_layer():
    model = nnx.eval_shape(lambda: build_model(tiny.run(model__num_heads=(2, 1)), rngs=nnx.Rngs(0)))
    names = ["decoder/0/attention:0", "decoder/0/attention:1", "decoder/1/attention:0"]
    assert [str(head) for head in kinds_of(model)["decoder"]] == names


@pytest.mark.slow
@pytest.mark.parametrize("measure", list(MEASURES))
def test_matrix_is_symmetric_with_zero_distance_on_the_diagonal_and_within_0_and_1(planted, measure):
    distance = planted[measure].distance
    np.testing.assert_array_equal(distance, distance.T)
    np.testing.assert_array_equal(np.diag(distance), 0)
    assert distance.min() > -ATOL and distance.max() < 1 + ATOL


@pytest.mark.slow
@pytest.mark.parametrize("measure", list(MEASURES))
def test_identical_head_is_found_also_in_another_basis_and_others_are_not(planted, measure):
    distance = planted[measure].distance
    np.testing.assert_allclose(distance[0, [1, 2]], 0, atol=5 * ATOL)
    assert distance[0, 4:].min() > 0.1


@pytest.mark.slow
def test_cka_ignores_turning_and_scaling_and_weights_do_not(planted):
    np.testing.assert_allclose(planted["cka"].value[0, 3], 1, atol=ATOL)
    np.testing.assert_allclose(planted["angles"].value[0, 3], 1, atol=ATOL)
    assert planted["weights"].value[0, 3] < 0.9


@pytest.mark.slow
def test_only_measures_of_data_have_standard_errors(planted):
    assert planted["weights"].standard_error is None
    for measure in ("js", "cka", "angles"):
        error = planted[measure].standard_error
        assert error.shape == (6, 6) and error[4, 5] > 0 and error[0, 0] == 0


def attended(q, k, rule):
    layer = nnx.eval_shape(lambda: MultiHeadAttention(12, q.shape[2], 1, 2, 5, rngs=nnx.Rngs(0)))
    return Attended(layer, q, k, k, rule)


def test_distance_of_disjoint_attention_is_one():
    k_BSGK = jnp.array([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    q_BTHK = jnp.broadcast_to(400 * jnp.eye(2), (1, 2, 2, 2))
    side = [attended(q_BTHK, k_BSGK, Full())]
    total, count = jax.jit(lambda: _attention_sums(side, side, jnp.ones((1, 2), bool), jax.random.key(0)))()
    np.testing.assert_allclose(total / count, 1 - np.eye(2), atol=1e-6)


def test_distance_is_the_mean_over_real_queries_of_that_of_the_whole_matrix():
    q, k = (jax.random.normal(jax.random.key(i), (2, 7, heads, 2)) for i, heads in ((0, 3), (1, 1)))
    real = np.arange(7)[None] < np.array([[7], [4]])
    side = [attended(2 * q, k, Causal())]
    total, count = jax.jit(lambda: _attention_sums(side, side, jnp.asarray(real), jax.random.key(0)))()
    w = np.asarray(jax.jit(lambda: attention_weights(2 * q, k, Causal()))(), np.float64).swapaxes(1, 2)[real]

    def bits(p):
        return -(p * np.log2(np.where(p > 0, p, 1))).sum(-1)

    squares = bits((w[:, :, None] + w[:, None]) / 2) - (bits(w)[:, :, None] + bits(w)[:, None]) / 2
    np.testing.assert_allclose(total / count, np.sqrt(np.maximum(squares, 0)).mean(0), atol=5 * ATOL)


def test_cka_and_angles_are_those_of_the_features():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(53, 3)), rng.normal(size=(53, 4))
    y[:, 0] += 2 * x[:, 1]
    x, y = x - x.mean(0), y - y.mean(0)
    sums = (jnp.asarray(x.T @ x)[None], jnp.asarray(y.T @ y)[None], jnp.asarray(x.T @ y)[None, :, None])
    gram_x, gram_y = x @ x.T, y @ y.T
    expected = (gram_x * gram_y).sum() / np.linalg.norm(gram_x) / np.linalg.norm(gram_y)
    aligned, (white, least) = jax.jit(lambda: (cka(*sums), cosines(*sums)))()
    np.testing.assert_allclose(aligned, [[expected]], atol=1e-5)
    found = np.linalg.svd(np.asarray(white)[0, :, 0], compute_uv=False)
    assert least.item() == 3
    np.testing.assert_allclose(found, np.sort(np.cos(scipy.linalg.subspace_angles(x, y)))[::-1], atol=1e-5)


def test_jackknife_of_a_mean_has_the_usual_standard_error():
    x = np.random.default_rng(2).normal(size=(5, 3)).astype(np.float32)
    parts = [(jnp.asarray(row), jnp.ones(())) for row in x]
    mean, error = jackknife(parts.__getitem__, 5, lambda sums: sums[0] / sums[1])
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(error, x.std(0, ddof=1) / np.sqrt(5), rtol=1e-4)


def test_weights_that_write_to_orthogonal_subspaces_do_not_overlap():
    model = nnx.eval_shape(lambda: build_model(tiny.run(model__num_layers=1), rngs=nnx.Rngs(0)))
    layer, rng = attentions(model)["decoder/0/attention"], np.random.default_rng(0)
    axes = np.zeros((4, 5, 12), np.float32)
    axes[0, np.arange(5), np.arange(5)] = axes[1, np.arange(5), np.arange(5, 10)] = 1
    axes[2] = 7 * axes[0]
    layer.out.kernel.set_value(jnp.asarray(axes))
    value = rng.normal(size=(12, 4, 5))
    value[:, 2] = value[:, 0]
    layer.value.kernel.set_value(jnp.asarray(value))
    overlap = weight_overlap("decoder", model)
    np.testing.assert_allclose(overlap[0, [1, 2, 3]], [0, 1, 0], atol=1e-6)  # head 3 writes nothing


@pytest.mark.slow
def test_kinds_of_a_translator_are_apart_and_uneven_layers_and_groups_are_compared():
    shape = {"model__num_heads": (6, 0), "model__num_kv_heads": (2, 0)}
    found = compare(make_model("translation", **shape), make_batches("translation", 4)[::2], tuple(MEASURES))
    assert {kind: len(found[kind]["cka"].rows) for kind in found} == {"encoder": 6, "decoder": 6, "cross": 6}
    assert all(np.isfinite(pairs.value).all() for by_measure in found.values() for pairs in by_measure.values())


@pytest.mark.slow
@pytest.mark.parametrize("length", [5, 256])
def test_192_heads_are_compared_and_squares_of_long_texts_are_never_held(length):
    layer = nnx.jit(lambda: MultiHeadAttention(12, 16, 16, 2, 2, rngs=nnx.Rngs(0)))()

    def observe(q_LBTHK):
        side = [Attended(layer, q, q, q[::-1], Causal()) for q in q_LBTHK]
        real = jnp.ones((2, length), bool)
        sums = {"attention": _attention_sums(side, side, real, jax.random.key(0))}
        return _estimate(("js", "cka", "angles"), {"decoder": sums | {"written": _written_sums(side, side, real)}})

    q_LBTHK = jax.random.normal(jax.random.key(0), (12, 2, length, 16, 2))
    lowered = jax.jit(observe).lower(q_LBTHK)
    if length == 256:
        assert "192x2x256x" in lowered.as_text() and "192x2x256x256x" not in lowered.as_text()
        return
    for value in lowered.compile()(q_LBTHK)["decoder"].values():
        assert value.shape == (192, 192) and np.isfinite(value).all()
        np.testing.assert_allclose(value, value.T, atol=ATOL)


@pytest.mark.parametrize(
    ("measures", "count", "message"),
    [
        (("cos",), 2, "unknown measure 'cos'; known are js, cka, angles, weights"),
        (("js",), 1, "comparing heads over 1 batches has no error bar; give at least 2"),
    ],
)
def test_what_cannot_be_compared_is_refused(measures, count, message):
    model = nnx.eval_shape(lambda: build_model(tiny.run(), rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match=message):
        compare(model, make_batches(count=count), measures)
