"""Every backend and a training step per task compile for a TPU without one, and lower for CUDA.

Lowering alone passes programs that the TPU's compiler refuses, so these compile. What they prove is that the compiler
takes the programs; results and speed are for other tests.
"""

import functools
import itertools
import os
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from mha_jax import attention
from mha_jax.attention import Causal, Full, Padding, PerHead, Segments, SlidingWindow
from mha_jax.training.step import abstract_batches, init_state, train_step
from tests import tiny

pytestmark = pytest.mark.slow

# B, T, S, H, G, K, V, type, rule of (lengths [B], ids [B, T])
CALLS = {
    "narrow keys": (2, 257, 257, 4, 4, 16, 64, "float32", lambda n, i: Causal() & SlidingWindow(24)),
    "gqa": (2, 1024, 1024, 8, 2, 64, 64, "bfloat16", lambda n, i: Causal()),
    "mqa across, odd widths": (2, 131, 61, 3, 1, 5, 7, "float32", lambda n, i: Padding(n)),
    "packed documents": (2, 384, 384, 2, 2, 128, 256, "bfloat16", lambda n, i: Causal() & Segments(i)),
    "per head": (1, 640, 640, 2, 2, 64, 32, "float32", lambda n, i: PerHead(Full(), SlidingWindow(64)) & Padding(n)),
}


@pytest.fixture(scope="module")
def tpu():
    """Places an array's shape on a TPU v5e that need not be there."""
    if find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install -r requirements-tpu-test.txt")
    # No look-ups of a cloud's metadata, and no lock against other test processes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    sharding = SingleDeviceSharding(topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0])
    # The real compiler, not the quick one of tests/conftest.py.
    jax.config.update("jax_disable_most_optimizations", False)
    yield lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")


def forward_and_backward(backend, name):
    """A function of q, k, v, lengths and ids, and their shapes."""
    batch, queries, keys, heads, groups, qk_dim, v_dim, dtype, rule = CALLS[name]

    def function(q, k, v, lengths, ids):
        def total(q, k, v):
            return attention.attend(q, k, v, rule(lengths, ids), backend=backend).astype(jnp.float32).sum()

        return jax.value_and_grad(total, (0, 1, 2))(q, k, v)

    shapes = (batch, queries, heads, qk_dim), (batch, keys, groups, qk_dim), (batch, keys, groups, v_dim)
    integers = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((batch, queries), jnp.int32)
    return function, [*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes), *integers]


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        *itertools.product(["einsum", "blockwise", "splash"], CALLS),
        *itertools.product(["diagonals", "strips", "rows"], ["narrow keys"]),
    ],
)
def test_forward_and_backward_compile_for_a_tpu(tpu, backend, name):
    function, arrays = forward_and_backward(backend, name)
    compiled = jax.jit(function).trace(*map(tpu, arrays)).lower().compile()
    # Forward, dq and dkv; an interpreted kernel would leave none.
    assert str(compiled.as_text()).count('custom_call_target="tpu_custom_call"') == (3 if backend == "splash" else 0)


def test_the_compiler_refuses_what_a_tpu_cannot_hold(tpu):
    too_large = tpu(jax.ShapeDtypeStruct((2**17, 2**16), jnp.float32))
    with pytest.raises(Exception, match="memory"):
        jax.jit(lambda x: jnp.sort(x @ x.T)).trace(too_large).lower().compile()


STEPS = [
    *itertools.product(["lm", "translation", "classification"], [("splash", 0.0), ("blockwise", 0.3), ("einsum", 0.3)]),
    ("masked_lm", ("splash", 0.0)),
]


@pytest.mark.parametrize(("task", "way"), STEPS)
def test_training_step_compiles_for_a_tpu(tpu, task, way):
    backend, dropout_rate = way
    run = tiny.run(task, model__backend=backend, model__attention_dropout_rate=dropout_rate)
    state = jax.tree.map(tpu, jax.eval_shape(functools.partial(init_state, run)))
    batch = jax.tree.map(tpu, abstract_batches(run)[0])
    compiled = jax.jit(functools.partial(train_step, run), donate_argnums=0).trace(state, batch).lower().compile()
    assert ("tpu_custom_call" in str(compiled.as_text())) == (backend == "splash")


@pytest.mark.parametrize("backend", ["einsum", "blockwise"])
def test_forward_and_backward_lower_for_cuda(backend):
    function, arrays = forward_and_backward(backend, "gqa")
    lowered = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert "func.func public @main" in lowered.as_text()
