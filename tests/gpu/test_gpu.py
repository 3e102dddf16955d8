"""On a GPU: every backend that serves it against the definition, what `auto` takes, and a training step per task.

Skipped elsewhere. JAX_PLATFORMS=cuda,cpu JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest tests/gpu -n 8, with
XLA_PYTHON_CLIENT_PREALLOCATE=false where several processes share the device.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax.attention import Causal, Full, Global, Padding, SlidingWindow, attend
from mha_jax.attention.attend import choose_backend
from mha_jax.attention.backends import cudnn
from mha_jax.attention.backends.call import Call, regular_groups
from mha_jax.training.parallel import make_program
from tests import tiny
from tests.attention import oracle
from tests.attention.test_grid import CELLS, GRID, check

if jax.default_backend() != "gpu":
    pytest.skip("there is no GPU", allow_module_level=True)

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def whole_mantissas():
    """Products of float32 as they are: by default a GPU shortens the factors' mantissas to 10 bits."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("backend", ["pallas", "rows", "blockwise"])
@pytest.mark.parametrize("part", range(8))
def test_backend_agrees_with_the_definition_on_the_grid(backend, part):
    served = [check(GRID[seed], backend, seed) for seed in range(part * 5, CELLS, 40)]
    assert all(served)


RULES = {
    "full": lambda lengths: Full(),
    "causal": lambda lengths: Causal(),
    "window": lambda lengths: Causal() & SlidingWindow(37),
    "padding": Padding,
    "causal and padding": lambda lengths: Causal() & Padding(lengths),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [64, 129, 1000])
@pytest.mark.parametrize("width", [8, 40, 64, 128, 192, 256])
@pytest.mark.parametrize("groups", [6, 2], ids=["mha", "gqa"])
def test_cudnn_agrees_with_the_definition(width, length, groups, rule):
    B, H = 3, 6
    lengths = jnp.array([length, 0, length // 3])
    made, dtype = RULES[rule](lengths), jnp.dtype(jnp.bfloat16)
    call = Call(B, length, length, H, regular_groups(H, groups) or (), groups, width, width, dtype, made, 0.0)
    if (reason := cudnn.refusal(call)) is not None:
        pytest.skip(reason)
    shapes = (B, length, H, width), (B, length, groups, width), (B, length, groups, width), (B, length, H, width)
    q, k, v, cotangent = (jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes))

    @jax.jit
    def both(q, k, v):
        o, pull = jax.vjp(functools.partial(attend, visibility=made, backend="cudnn"), q, k, v)
        return dict(zip("oqkv", (o, *pull(cotangent)), strict=True))

    expected = oracle.attention(q, k, v, cotangent, made.mask(length, length), call.groups, width**-0.5)
    # bfloat16 rounds at 4e-3; a wrong mask, group or scale shows at 0.1 and more.
    assert oracle.worst(both(q, k, v), expected) < 3e-2


@pytest.mark.parametrize(
    ("width", "dtype", "rule", "rate", "wanted"),
    [
        (64, "bfloat16", Causal(), 0.0, "cudnn"),
        (64, "bfloat16", Causal(), 0.1, "pallas"),
        (64, "bfloat16", Causal() & (SlidingWindow(9) | Global(2)), 0.0, "pallas"),
        (64, "float32", Causal(), 0.0, "pallas"),
        (512, "bfloat16", Causal(), 0.0, "rows"),
    ],
)
def test_auto_takes_the_quickest_that_serves(width, dtype, rule, rate, wanted):
    call = Call(4, 1024, 1024, 4, (0, 1, 2, 3), 4, width, width, jnp.dtype(dtype), rule, rate)
    assert choose_backend("auto", call).name == wanted


@pytest.mark.parametrize("task", ["lm", "masked_lm", "translation", "classification"])
def test_a_task_trains_in_bfloat16_as_in_float32(task):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        run = dataclasses.replace(tiny.run(task), parallel="jit")
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, dtype=dtype))
        program = make_program(run, jax.devices()[:1])
        state, found = program.init(), []
        for batch in tiny.batches(run, 5):
            state, metrics = program.step(state, batch)
            found.append(np.asarray(metrics["loss"]))
        losses[dtype] = np.array(found)
    assert np.isfinite(losses["float32"]).all()
    # bfloat16 rounds at 4e-3, and losses are near 5 nats.
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], atol=0.05)
