import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax.attention import Padding, attend
from mha_jax.attention.decode import decode_attention
from mha_jax.specs import HeadShape

B, S, K, V = 3, 13, 5, 7
MAPS = {
    "MHA": HeadShape(6, 6, K, V),
    "GQA": HeadShape(6, 3, K, V),
    "MQA": HeadShape(6, 1, K, V),
    "ragged, one group unread": HeadShape(5, 4, K, V, (2, 0, 2, 1, 2)),
    "as many a group, out of order": HeadShape(6, 2, K, V, (1, 0, 0, 1, 0, 1)),
}
decode = jax.jit(decode_attention, static_argnames="groups")


def arrays(shape, queries, dtype=jnp.float32, batch=B, keys=S):
    sizes = (
        (batch, queries, shape.num_heads, shape.qk_dim),
        (batch, shape.num_kv_heads, keys, shape.qk_dim),
        (batch, shape.num_kv_heads, keys, shape.v_dim),
    )
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=size), dtype) for size in sizes]


def reference(q, k_BGSK, v_BGSV, lengths, shape):
    k, v = k_BGSK.swapaxes(1, 2), v_BGSV.swapaxes(1, 2)
    rule = Padding(jnp.broadcast_to(lengths, q.shape[0]))
    return attend(q, k, v, rule, head_to_group=shape.head_to_group, backend="einsum")


@functools.partial(jax.jit, static_argnames="shape")
def both(one_token, hypotheses, shape):
    """What is decoded and what it should be, for each of the two sets of q, k, v, lengths."""
    return [(decode(*x, groups=shape.groups), reference(*x, shape)) for x in (one_token, hypotheses)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in MAPS), ("ragged, one group unread", "float64")],
)
def test_one_token_and_hypotheses_of_a_sentence_equal_attend(name, dtype):
    shape = MAPS[name]
    with jax.enable_x64(dtype == "float64"):
        tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == "float64" else {"rtol": 1e-5, "atol": 1e-6}
        one_token = *arrays(shape, 1, dtype), jnp.array(6)
        hypotheses = *arrays(shape, 4, dtype), jnp.array([13, 0, 2])
        for decoded, expected in both(one_token, hypotheses, shape):
            assert decoded.dtype == dtype
            np.testing.assert_allclose(decoded, expected, **tolerance)


@pytest.mark.parametrize("name", ["MHA", "MQA"])
def test_bfloat16_adds_up_in_float32(name):
    shape = MAPS[name]
    q, k, v = arrays(shape, 1, jnp.bfloat16, keys=257)
    # Equal weights of 1: 257 of them, and 129 times 255 / 128, are no bfloat16 numbers.
    lengths, even = jnp.array([129, 257, 1]), jnp.full_like(v, 255 / 128)
    o = decode(jnp.zeros_like(q), k, even, lengths, groups=shape.groups)
    assert o.dtype == jnp.bfloat16
    np.testing.assert_array_equal(o.astype(jnp.float32), 255 / 128)
    # Of logits of 32 to 64, bfloat16 would round off up to an eighth.
    exact = reference(*(x.astype(jnp.float32) for x in (30 * q, k, v)), lengths, shape)
    o = decode(30 * q, k, v, lengths, groups=shape.groups)
    np.testing.assert_allclose(o.astype(jnp.float32), exact, atol=0.02)


def test_what_lies_beyond_the_lengths_reaches_nobody():
    shape, lengths = MAPS["GQA"], jnp.array([4, 0, 13])
    q, k, v = arrays(shape, 1)
    hidden = (jnp.arange(S)[None, :] >= lengths[:, None])[:, None, :, None]
    clean = decode(q, jnp.where(hidden, 0, k), jnp.where(hidden, 0, v), lengths, groups=shape.groups)
    soiled = decode(q, jnp.where(hidden, jnp.nan, k), jnp.where(hidden, 1e30, v), lengths, groups=shape.groups)
    np.testing.assert_array_equal(soiled, clean)
    assert (clean[1] == 0).all()
    assert np.isfinite(clean).all()


def test_no_heads_give_no_outputs():
    for num_groups in (0, 2):
        q, k, v = arrays(HeadShape(0, num_groups, K, V), 1)
        assert decode(q, k, v, jnp.array(3), groups=()).shape == (B, 1, 0, V)


@functools.cache
def compiled_step(heads, num_groups, dtype="float32", queries=1):
    shape = HeadShape(heads, num_groups, 32, 16)
    q, k, v = arrays(shape, queries, dtype, batch=2, keys=1031)
    return decode.lower(q, k, v, jnp.array(1), groups=shape.groups).compile(), k.nbytes + v.nbytes


def results(text):
    """(operation, elements of its result) of every array in a compiled program."""
    for size, operation in re.findall(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(", text):
        yield operation, math.prod(int(n) for n in size.split(","))


@pytest.mark.parametrize(("num_groups", "dtype"), [(1, "float32"), (2, "bfloat16"), (8, "float32"), (8, "bfloat16")])
def test_the_step_writes_nothing_of_the_size_of_its_cache(num_groups, dtype):
    program, _ = compiled_step(8, num_groups, dtype)
    found = list(results(program.as_text()))
    values = 2 * num_groups * 1031 * 16
    assert ("parameter", values) in found
    # The logits are [B, H, S]: as many as values where V = H / G, and nowhere more.
    limit = max(values, 2 * 8 * 1031 + 1)
    assert [pair for pair in found if pair[0] not in ("parameter", "bitcast") and pair[1] >= limit] == []


def test_bytes_of_a_step_go_with_groups_not_with_heads():
    moved = {}
    for num_groups in (1, 8):
        program, cache_bytes = compiled_step(8, num_groups)
        moved[num_groups] = program.cost_analysis()["bytes accessed"]
        assert moved[num_groups] > cache_bytes
    assert moved[8] < 1.5 * cache_bytes
    assert moved[8] > 3 * moved[1]
