"""Statistics of attention weights in one pass equal those of the whole matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax.attention import Causal, Full, Padding, PerHead, SlidingWindow, attend
from mha_jax.attention.statistics import attend_with_statistics, attention_weights
from mha_jax.specs import UserError

B, T, K, V = 2, 131, 5, 3


def arrays(heads=4, groups=2, queries=T, keys=T):
    shapes = (B, queries, heads, K), (B, keys, groups, K), (B, keys, groups, V)
    rng = np.random.default_rng(0)
    return [jnp.asarray(2 * rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize(
    ("rule", "keys"),
    [
        (Causal(), T),
        (Full(), 67),
        (Padding(jnp.array([0, 77])), T),
        (PerHead(Causal(-3), Causal() & SlidingWindow(9), Full(), Causal()), T),
    ],
)
def test_statistics_are_those_of_the_matrix(rule, keys):
    q, k, v = arrays(keys=keys)

    @jax.jit
    def program(q, k, v):
        known = attention_weights(q, k, rule), attend(q, k, v, rule, backend="einsum")
        return attend_with_statistics(q, k, v, rule), known

    (o, found), (w, attended) = jax.device_get(program(q, k, v))
    w = w.astype(np.float64)
    t, s = np.arange(T)[:, None], np.arange(keys)[None, :]
    expected = {
        "entropy": -(w * np.log(np.where(w > 0, w, 1))).sum(-1),
        "max_weight": w.max(-1),
        "distance": (w * abs(t - s)).sum(-1),
        "first": w[..., 0],
        "diagonal": (w * (t == s)).sum(-1),
    }
    for name, value in expected.items():
        # Distances are up to 131 positions, each weight right to 1e-6.
        np.testing.assert_allclose(
            getattr(found, name), value.swapaxes(1, 2), atol=1e-4 if name == "distance" else 1e-5
        )
    np.testing.assert_allclose(o, attended, atol=1e-5)


def test_weights_of_chosen_heads_and_examples_are_those_of_the_whole():
    q, k, v = arrays(queries=7, keys=11)
    rule = PerHead(Full(), Padding(jnp.array([3, 8])), Causal(), Causal(2))

    @jax.jit
    def program(q, k, v):
        options = {"scale": 0.7, "head_to_group": (1, 0, 1, 1)}
        part = attention_weights(q, k, rule, **options, heads=(3, 1), examples=(1,))
        return attention_weights(q, k, rule, **options), part, attend(q, k, v, rule, **options)

    whole, part, attended = map(np.asarray, program(q, k, v))
    np.testing.assert_allclose(part, whole[1:, [3, 1]], atol=1e-6)
    o = np.einsum("bhts,bshv->bthv", whole, np.asarray(v)[:, :, [1, 0, 1, 1]])
    np.testing.assert_allclose(o, attended, atol=1e-5)


def test_query_that_sees_nothing_has_weights_and_statistics_of_zero():
    q, k, v = arrays()
    rule = Causal(-1)
    program = jax.jit(lambda q, k, v: (attend_with_statistics(q, k, v, rule)[1], attention_weights(q, k, rule)))
    found, weights = jax.device_get(program(q, k, v))
    assert not any(value[:, 0].any() for value in found)
    assert not weights[:, :, 0].any()


def test_matrix_of_a_long_sequence_is_never_made():
    q, k, v = (jnp.ones((1, 4096, 2, 4)) for _ in range(3))
    text = jax.jit(lambda q, k, v: attend_with_statistics(q, k, v, Causal())).lower(q, k, v).as_text()
    assert "4096x4096" not in text


def test_empty_axes_are_legal():
    q, k, v = arrays(0, 0)
    o, found = attend_with_statistics(q, k, v)
    assert o.shape == (B, T, 0, V) and found.entropy.shape == (B, T, 0)


@pytest.mark.parametrize(
    ("choice", "message"),
    [({"heads": (4,)}, "there is no head 4; there are 4, 0 to 3"), ({"examples": (-1,)}, "there is no example -1")],
)
def test_head_or_example_that_does_not_exist_is_refused(choice, message):
    q, k, _ = arrays()
    with pytest.raises(UserError, match=message):
        attention_weights(q, k, **choice)
