"""Training with routers and spans: on any devices the numbers of one, balance and spans move, evaluation tells them."""

import functools

import jax
import numpy as np
import pytest

from mha_jax.training.parallel import make_program
from mha_jax.training.step import evaluate_step, init_state, train_step
from tests import tiny

DEVICES = {"model__dtype": "float64", "model__num_layers": 1}
MOH = {"model__routing__kind": "moh", "model__routing__shared": 1, "model__routing__top_k": 2}
SPANS = {"model__adaptive_span__max_span": 9, "model__adaptive_span__ramp": 3, "model__adaptive_span__init": 0.5}
STRONG = {"model__routing__balance_weight": 1.0, "model__routing__z_weight": 0.1, "model__adaptive_span__weight": 0.1}
LAYOUTS = {
    "jit over data": {"parallel": "jit", "mesh__data": 8},
    "jit over seed, data and head": {"parallel": "jit", "mesh__seed": 2, "mesh__data": 2, "mesh__head": 2},
    "pmap over data": {"parallel": "pmap", "mesh__data": 8},
}


def trained(spec, devices, steps=3):
    program = make_program(spec, jax.devices()[:devices])
    state, metrics = program.init(), []
    for batch in tiny.batches(spec, steps):
        state, told = program.step(state, batch)
        metrics.append({name: np.asarray(value) for name, value in told.items()})
    return jax.device_get(program.unload(state)["params"]), metrics


@functools.cache
def on_one_device():
    return trained(tiny.run("lm", **DEVICES, **MOH, **SPANS, **STRONG), 1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_eight_devices_equal_one_in_float64(layout):
    # Tolerance: float64 rounding after 3 Adam steps; a shard that balances by its own tokens shows at 1e-4.
    with jax.enable_x64(True):
        expected, metrics = on_one_device()
        spread = tiny.run("lm", **DEVICES, **MOH, **SPANS, **STRONG, **LAYOUTS[layout])
        params, told = trained(spread, 8)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-9), params, expected)
    for one, other in zip(metrics, told, strict=True):
        for name in ("loss", "balance_loss", "router_loss", "span_loss", "grad_norm"):
            np.testing.assert_allclose(other[name], one[name], rtol=1e-9, err_msg=name)


@pytest.mark.slow
def test_balance_improves_spans_shrink_and_evaluation_tells_both():
    # One routed head a token and a heavy weight: balance starts poor and is what the step follows.
    heavy = {"model__routing__top_k": 1, "model__routing__balance_weight": 100.0}
    rate = {"optimizer__learning_rate": 2e-2, "optimizer__schedule": "constant"}
    spec = tiny.run("lm", **(MOH | SPANS | STRONG | heavy | rate))
    state, batch = init_state(spec), tiny.batches(spec, 1)[0]
    step, look = (jax.jit(functools.partial(one, spec)) for one in (train_step, evaluate_step))
    one = {name: leaf[0] for name, leaf in batch.items()}
    for block in state["params"]["decoder"]["blocks"].values():
        block["attention"]["router"]["kernel"] *= 5
    losses, seen = [], []
    for number in range(40):
        if number % 39 == 0:
            sums = look(state["params"], state["constants"], one)
            seen.append({name: np.asarray(value / sums["weight"]) for name, value in sums.items()})
        state, metrics = step(state, batch)
        losses.append({name: np.asarray(metrics[name]) for name in ("balance_loss", "span_loss")})
    for name in ("balance_loss", "span_loss"):
        assert (losses[-1][name] < losses[0][name]).all(), name
    for layer in (0, 1):
        name = f"decoder/{layer}/attention"
        np.testing.assert_allclose(seen[-1][f"active_heads/{name}"], [2, 2], rtol=1e-6)
        assert (seen[-1][f"span/{name}"] < seen[0][f"span/{name}"]).all()
        assert (seen[-1][f"busiest_head/{name}"] >= 1 / 3 - 1e-6).all()
