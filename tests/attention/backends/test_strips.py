"""Strips against tiles at lengths where they start anywhere, what they refuse, and when `auto` takes them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax.attention import BigBird, BlockDiagonal, Causal, Padding, PerHead, PrefixLM, SlidingWindow, attend
from mha_jax.attention.attend import choose_backend
from mha_jax.attention.backends import strips, tiling
from mha_jax.attention.backends.call import Call
from mha_jax.attention.backends.tiling import Strips, halved, plan_strips

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
    hidden = (np.arange(B)[:, None] == 1) & (np.arange(S) >= 150)
    k, v = (np.where(hidden[..., None, None], np.float32(np.nan), x) for x in (k, v))

    def with_slopes(backend):
        def run(q, k, v):
            return attend(q, k, v, rule, dropout_rate=0.2, dropout_key=jax.random.key(1), backend=backend)

        out, pull = jax.vjp(run, q, k, v)
        return out, *pull(cotangent)

    both = jax.jit(lambda: (with_slopes("strips"), with_slopes("blockwise")))
    for found, wanted in zip(*both(), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-6)  # sums of some hundred numbers of order 1
        assert np.abs(wanted).max() > 0.1


def test_heads_in_turns_agree_with_tiles_where_rows_see_places_apart(monkeypatch):
    monkeypatch.setattr(tiling, "_cached_elements", lambda: 2**13)
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 400, 4, width)), jnp.float32) for width in (8, 8, 5))
    rule = BlockDiagonal(100) & ~SlidingWindow(3)
    plan, padded = plan_strips(rule, 1, 400, 400, 4, 1.0, 0.0)
    strips_ = halved(plan, padded, 1, of_keys=False)
    assert strips_.num_steps == 2 and max(np.diff(strips_.starts)) == 96 > strips_.step
    both = jax.jit(lambda *x: [attend(*x, rule, backend=name) for name in ("strips", "blockwise")])
    found, wanted = both(q, k, v)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)  # means of some ten numbers of order 1


@pytest.mark.parametrize(
    ("rule", "queries", "keys", "widths"),
    [
        (Causal() & SlidingWindow(256), 1000, 1000, (288, 288)),
        (SlidingWindow(30), 500, 100, (96, 96)),
        (BlockDiagonal(96), 1000, 700, (96, 96)),
        (PrefixLM(40) & SlidingWindow(9), 150, 300, (64, 96)),
        (Causal() & SlidingWindow(9), 20, 20, (24, 24)),
    ],
)
def test_strip_holds_all_that_its_row_sees_and_stays_inside(rule, queries, keys, widths):
    plan, rule = plan_strips(rule, 1, queries, keys, 8, 1.0, 0.0)
    whole = jax.jit(lambda: rule.mask(plan.tiles.query_length, plan.tiles.key_length)[0, 0])()
    for of_keys, width in zip((False, True), widths, strict=True):
        strips_, mask = halved(plan, rule, 1, of_keys), np.asarray(whole)
        assert strips_.width == width
        mask = mask.T if of_keys else mask
        assert len(strips_.starts) * strips_.block == len(mask)
        for row, start in enumerate(strips_.starts):
            assert 0 <= start <= mask.shape[1] - width
            rows = mask[row * strips_.block : (row + 1) * strips_.block]
            assert rows.sum() == rows[:, start : start + width].sum()


@pytest.mark.parametrize("starts", [(0, 0, 32, 64, 256, 96, 96), (128, 0, 160)])
def test_ring_holds_the_strip_of_each_row_between_what_it_fetches_and_what_leaves(starts):
    plan, _ = plan_strips(Causal() & SlidingWindow(100), 1, 512, 512, 8, 1.0, 0.0)
    strips_ = Strips(**vars(plan), block=32, step=32, starts=starts, width=160)
    (begin, end, fetched), (first, last, left) = (map(np.asarray, lists) for lists in (strips_.fetches, strips_.leaves))
    ring = np.full(5, -1)
    for row, start in enumerate(starts):
        new = fetched[begin[row] : end[row]]
        assert (ring[new % 5] == -1).all(), "only free places are written to"
        ring[new % 5] = new
        assert sorted(ring) == list(range(start // 32, start // 32 + 5))
        ring[left[first[row] : last[row]] % 5] = -1
    assert (ring == -1).all()


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
