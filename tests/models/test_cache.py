import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mha_jax.models.cache import cached_step, empty_cache, read_memory
from mha_jax.models.transformer import build_model

N, S = 3, 17


def abstract_decoder(run):
    return nnx.split(nnx.eval_shape(lambda: build_model(run, rngs=nnx.Rngs(0)).decoder))


def test_cache_and_memory_lie_by_groups(make_run):
    graph, state = abstract_decoder(make_run("translation", num_heads=6, num_kv_heads=2))

    def both(state):
        decoder = nnx.merge(graph, state)
        return empty_cache(decoder, N, S), read_memory(decoder, jnp.ones((N, 5, 11)), jnp.array([5, 2, 0]))

    cache, memory = jax.eval_shape(both, state)
    for layers, length in ((cache, S), (memory.layers, 5)):
        assert [(x.k_BGSK.shape, x.v_BGSV.shape) for x in layers] == 2 * [((N, 2, length, 4), (N, 2, length, 5))]


@pytest.mark.parametrize(("rows", "groups"), [(3, 3), (3, 1), (1, 2)])
def test_a_step_copies_and_transposes_no_cache(make_run, rows, groups):
    run = make_run("lm", num_layers=1, num_heads=6, num_kv_heads=groups, qk_dim=16, v_dim=16, max_length=211)
    graph, state = abstract_decoder(run)
    cache = jax.eval_shape(lambda state: empty_cache(nnx.merge(graph, state), rows, 211), state)

    def step(cache, state, x_N1D, position):
        return cached_step(nnx.merge(graph, state), x_N1D, position, cache)

    # The cache is given away, as the loops of decoding do: else one copy would be the caller's.
    lowered = jax.jit(step, donate_argnums=0).lower(cache, state, jnp.ones((rows, 1, 11)), jnp.array(3))
    results = re.findall(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(", lowered.compile().as_text())
    sizes = [(operation, math.prod(int(n) for n in size.split(","))) for size, operation in results]
    cache_size = rows * groups * 211 * 16
    large = {operation for operation, size in sizes if size >= cache_size}
    assert "dynamic-update-slice" in large
    assert large <= {"parameter", "bitcast", "get-tuple-element", "dynamic-update-slice", "fusion"}
    assert max(size for _, size in sizes) == cache_size


def test_padding_of_the_memory_may_hold_anything(make_run):
    model = build_model(make_run("translation", num_layers=1), rngs=nnx.Rngs(0))
    memory_BSD = jax.random.normal(jax.random.key(1), (N, 5, 11))
    lengths = jnp.array([5, 2, 0])
    hidden = (jnp.arange(5)[None, :] >= lengths[:, None])[:, :, None]
    x_N1D, cache = jnp.ones((N, 1, 11)), empty_cache(model.decoder, N, S)

    @nnx.jit
    def step(decoder, memory_BSD):
        return cached_step(decoder, x_N1D, jnp.array(0), cache, read_memory(decoder, memory_BSD, lengths))[0]

    clean, soiled = (step(model.decoder, jnp.where(hidden, filler, memory_BSD)) for filler in (0.0, jnp.nan))
    assert np.isfinite(clean).all()
    np.testing.assert_array_equal(soiled, clean)
