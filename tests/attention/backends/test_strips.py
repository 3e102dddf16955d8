"""Strips against tiles at lengths where they start anywhere, what they refuse, and when `auto` takes them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax.attention import BigBird, BlockDiagonal, Causal, Padding, PerHead, SlidingWindow, attend
from mha_jax.attention.attend import choose_backend
from mha_jax.attention.backends import strips
from mha_jax.attention.backends.call import Call
from mha_jax.attention.backends.tiling import plan_strips, strips_of

B, T, S, H = 2, 397, 333, 4


def call(rule, length=4096, heads=8):
    return Call(1, length, length, heads, tuple(range(heads)), heads, 32, 32, jnp.dtype("float32"), rule, 0.0)


def test_strips_agree_with_tiles_in_values_gradients_and_dropped_weights():
    rng = np.random.default_rng(0)
    q, k, v, cotangent = (
        jnp.asarray(rng.normal(size=(B, length, H, width)), jnp.float32)
        for length, width in ((T, 8), (S, 8), (S, 5), (T, 5))
    )
    rule = SlidingWindow(70) & Padding(jnp.array([S, 150]))  # queries from 220 on see nothing in the second example
    k, v = (x.at[1, 150:].set(jnp.nan) for x in (k, v))

    def both(backend):
        def run(q, k, v):
            return attend(q, k, v, rule, dropout_rate=0.2, dropout_key=jax.random.key(1), backend=backend)

        out, pull = jax.vjp(run, q, k, v)
        return out, *pull(cotangent)

    for found, wanted in zip(jax.jit(lambda: both("strips"))(), jax.jit(lambda: both("blockwise"))(), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-6)  # sums of some hundred numbers of order 1
        assert np.abs(wanted).max() > 0.1


def test_strip_holds_all_that_its_row_sees_and_stays_inside():
    plan, rule = plan_strips(Causal() & SlidingWindow(256), 1, 1000, 1000, 8, 1.0, 0.0)
    starts, width = strips_of(plan.tiles)
    assert width == 320 and plan.tiles.key_length == 1024
    mask = np.asarray(rule.mask(1024, 1024))[0, 0]
    for row, start in enumerate(starts):
        assert 0 <= start <= 1024 - width
        rows = mask[row * 64 : row * 64 + 64]
        assert rows.sum() == rows[:, start : start + width].sum() > 0


def test_refuses_wide_ranges_and_heads_with_places_of_their_own():
    assert "up to 4096 places apart" in str(strips.refusal(call(Causal())))
    assert "4096" in str(strips.refusal(call(Causal() & BigBird(64, 96, 3, 128, 4096))))
    mixed = PerHead(*[Causal() & SlidingWindow(64 * (1 + h % 2)) for h in range(8)])
    assert "heads see places of their own" in str(strips.refusal(call(mixed)))
    assert "an axis is empty" in str(strips.refusal(dataclasses.replace(call(Causal()), batch=0)))


@pytest.mark.parametrize(
    ("rule", "length", "name"),
    [
        (Causal() & SlidingWindow(256), 4096, "strips"),
        (SlidingWindow(256), 4096, "strips"),
        (Causal(), 1024, "blockwise"),
        (BlockDiagonal(512), 4096, "blockwise"),
        (Causal(), 4096, "blockwise"),
    ],
)
def test_auto_takes_strips_for_windows_and_not_where_large_tiles_are_quicker(rule, length, name):
    assert choose_backend("auto", call(rule, length)).name == name
