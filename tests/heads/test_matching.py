"""A model is matched with itself in another order, and layers with each other."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mha_jax.heads import attentions
from mha_jax.heads.matching import match, match_layers, match_models
from mha_jax.heads.similarity import Head, Pairs
from mha_jax.models import build_model
from tests import tiny

ORDER = [2, 0, 3, 1]


def pairs_of(value, name="decoder/0/attention", other="decoder/0/attention"):
    rows, columns = (tuple(Head(n, h) for h in range(size)) for n, size in zip((name, other), value.shape, strict=True))
    return Pairs("cka", rows, columns, value, None)


def test_best_pairing_and_its_chance_level():
    value = np.array([[0.1, 0.9, 0.3], [0.8, 0.85, 0.2]])
    found = match(pairs_of(value))
    assert [(one.number, other.number) for one, other in found.pairs] == [(0, 1), (1, 0)]
    assert found.matched == pytest.approx(0.85)
    assert found.chance == pytest.approx(value.mean())


def test_a_permutation_is_no_chance_and_noise_is():
    sure, noise = 0.1 + 0.8 * np.eye(7)[::-1], np.random.default_rng(0).random((7, 7))
    assert match(pairs_of(sure)).p_value < 0.05
    assert match(pairs_of(noise)).p_value > 0.05
    assert match(pairs_of(sure)).shuffled < match(pairs_of(sure)).matched


def test_heads_that_are_like_all_others_are_no_match():
    hubs = np.linspace(0.1, 0.5, 7)[:, None] + np.linspace(0, 0.4, 7)[None]
    noisy = match(pairs_of(hubs + 0.02 * np.random.default_rng(1).random((7, 7))))
    assert noisy.p_value > 0.05
    assert noisy.shuffled == pytest.approx(noisy.matched, abs=0.01)


def test_every_two_layers_are_matched():
    rows = tuple(Head(f"decoder/{layer}/attention", h) for layer in range(3) for h in range(2))
    value = np.eye(6) + 0.5 * (np.eye(6, k=3) + np.eye(6, k=-3))  # heads 0 and 3, 1 and 4, 2 and 5 are alike
    found = list(match_layers({"decoder": {"cka": Pairs("cka", rows, rows, value, None)}}))
    names = [f"decoder/{layer}/attention" for layer in range(3)]
    assert [one.between for one in found] == [(names[0], names[1]), (names[0], names[2]), (names[1], names[2])]
    first = found[0].matching
    assert first.matched == pytest.approx(0.25)
    assert (Head(names[0], 1), Head(names[2], 0)) not in first.pairs
    assert {(Head(names[0], 0), Head(names[1], 1))} <= set(first.pairs)


@pytest.mark.slow
def test_model_with_its_heads_permuted_is_matched_by_the_permutation():
    spec = tiny.run(model__num_layers=1)
    model = nnx.jit(lambda: build_model(spec, rngs=nnx.Rngs(0)))()
    twin, order = nnx.clone(model), np.array(ORDER)
    layer = attentions(twin)["decoder/0/attention"]
    for kernel in (layer.query.kernel, layer.key.kernel, layer.value.kernel):
        kernel[...] = kernel[...][:, order]
    layer.out.kernel[...] = layer.out.kernel[...][order]
    batches = [{name: jnp.asarray(x[0]) for name, x in batch.items()} for batch in tiny.batches(spec, 2)]
    found = list(match_models("one", model, {"twin": twin}, batches, ("js", "cka", "weights")))
    assert [one.measure for one in found] == ["js", "cka", "weights"]
    for one in found:
        assert one.between == ("one", "twin")
        assert {other.number: head.number for head, other in one.matching.pairs} == dict(enumerate(ORDER))
        assert one.matching.matched == pytest.approx(1, abs=1e-3)  # the JS distance is a root of rounding
        assert one.matching.chance < 0.9
