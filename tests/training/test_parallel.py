"""However the step is spread over devices, the numbers are those of one device; seeds together are seeds one by one."""

import functools
import types

import jax
import numpy as np
import pytest

from mha_jax.attention import BACKENDS, attend
from mha_jax.attention.attend import _PREFERRED
from mha_jax.specs import UserError
from mha_jax.training import hosts, parallel
from mha_jax.training.parallel import make_program
from mha_jax.training.step import init_state
from tests import tiny

DROPOUT = {"model__dropout_rate": 0.2, "model__attention_dropout_rate": 0.3}
# Seeds that are not their own places in the batch.
SMALL = {"seeds": (3, 5), "model__num_layers": 1, **DROPOUT}


def trained(spec, batches, devices, program=None):
    """Parameters and per-step losses after so many steps, on the host; the program may be that of other seeds."""
    program = program or make_program(spec, jax.devices()[:devices])
    state, losses = program.load(init_state(spec)), []
    for batch in batches:
        state, metrics = program.step(state, batch)
        losses.append(np.asarray(metrics["loss"]))
    return jax.device_get(program.unload(state)["params"]), np.stack(losses)


def largest_gap(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.max(np.abs(x - y))), a, b)))


LAYOUTS = {
    "jit over data": {"parallel": "jit", "mesh__data": 8},
    "jit over seed, data and head": {"parallel": "jit", "mesh__seed": 2, "mesh__data": 2, "mesh__head": 2},
    "pmap over data": {"parallel": "pmap", "mesh__data": 8},
}


@functools.cache
def on_one_device(task):
    """In float64: the batches of 20 steps, and what training on them gives."""
    spec = tiny.run(task, model__dtype="float64", **SMALL)
    batches = tiny.batches(spec, 20)
    return batches, *trained(spec, batches, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "task"),
    [
        *((layout, "lm") for layout in LAYOUTS),
        ("jit over seed, data and head", "translation"),
        ("pmap over data", "translation"),
        ("pmap over data", "classification"),
        ("jit over seed, data and head", "masked_lm"),
    ],
)
def test_eight_devices_equal_one_over_20_steps_in_float64(layout, task):
    # Tolerance: 20 Adam steps amplify float64 rounding (2e-16) to about 1e-12 here; a wrong sum shows at 1e-3.
    with jax.enable_x64(True):
        batches, expected, losses = on_one_device(task)
        spread = tiny.run(task, model__dtype="float64", **SMALL, **LAYOUTS[layout])
        params, spread_losses = trained(spread, batches, 8)
    assert np.abs(spread_losses - losses).max() <= 1e-9
    assert largest_gap(params, expected) <= 1e-9


@pytest.mark.slow
def test_eight_devices_equal_one_over_5_steps_in_float32():
    # Tolerance: float32 sums in another order differ by 1e-7 a step; later steps drift, as Adam divides by small v.
    spec = tiny.run("lm", optimizer__epsilon=1e-6, **SMALL)
    batches = tiny.batches(spec, 5)
    expected, losses = trained(spec, batches, 1)
    for layout in ("jit over seed, data and head", "pmap over data"):
        spread = tiny.run("lm", optimizer__epsilon=1e-6, **SMALL, **LAYOUTS[layout])
        params, spread_losses = trained(spread, batches, 8)
        assert np.abs(spread_losses - losses).max() <= 2e-6, layout
        assert largest_gap(params, expected) <= 2e-6, layout


@pytest.mark.slow
@pytest.mark.parametrize("task", ["lm", "translation"])
def test_seeds_together_equal_seeds_one_by_one(task):
    with jax.enable_x64(True):
        batches, together, losses = on_one_device(task)
        program = None
        for index, seed in enumerate(SMALL["seeds"]):
            alone = tiny.run(task, model__dtype="float64", **{**SMALL, "seeds": (seed,)})
            program = program or make_program(alone, jax.devices()[:1])
            own = [{name: leaf[index : index + 1] for name, leaf in batch.items()} for batch in batches]
            params, own_losses = trained(alone, own, 1, program)
            assert np.abs(own_losses[:, 0] - losses[:, index]).max() <= 1e-9
            assert largest_gap(jax.tree.map(lambda x, i=index: x[i : i + 1], together), params) <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["jit over seed, data and head", "pmap over data"])
def test_a_run_begins_alike_however_it_is_spread(layout):
    spec = tiny.run("lm", **SMALL, **LAYOUTS[layout])
    program = make_program(spec, jax.devices())
    begun = jax.device_get(program.unload(program.init())["params"])
    # Tolerance: compiled apart, a draw may round otherwise; other draws differ by 1e-1.
    assert largest_gap(begun, jax.device_get(init_state(spec)["params"])) <= 1e-6


def test_heads_are_split_over_the_head_axis_of_the_mesh():
    program = make_program(tiny.run("lm", mesh__head=4, mesh__data=2), jax.devices())
    attention = program.init()["params"]["decoder"]["blocks"][0]["attention"]
    for name, axis in (("query", 2), ("key", 2), ("value", 2), ("out", 1)):
        kernel = attention[name]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape)[axis] == 1, name


def test_batches_counted_in_tokens_are_refused_by_their_rows():
    rows = "batches of 24 and 40 rows do not split over 3 data devices; 1, 2, 4 and 8 fit"
    with pytest.raises(UserError, match=rows):
        make_program(tiny.run("translation", data__batch_tokens=24 * 13, mesh__data=3), jax.devices())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"parallel": "pmap"}, "parallel='pmap' runs in one process"),
        ({"mesh__data": 4}, "uses 4 of 8 devices; over several processes it must use them all"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(monkeypatch, overrides, message):
    monkeypatch.setattr(hosts, "_group", hosts.Group(2, 0, "localhost:1"))
    with pytest.raises(UserError, match=message):
        make_program(tiny.run("lm", **overrides), jax.devices())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data__batch_size": 6}, "data.batch_size=6 is not a multiple of 8 data devices; 1, 2, 3 and 6 fit"),
        ({"mesh__head": 8}, "mesh.head=8 does not divide num_heads=4 and num_kv_heads=4; 1, 2 and 4 fit"),
        ({"parallel": "pmap", "mesh__head": 2}, "parallel='pmap' splits data only"),
        ({"mesh__data": 16}, "needs 16 devices; there are 8"),
    ],
)
def test_what_does_not_fit_the_devices_is_refused(overrides, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        make_program(tiny.run("lm", **overrides), jax.devices())


def test_the_compiler_knows_the_options_that_a_gpu_gets():
    options = parallel._COMPILER_OPTIONS["gpu"]
    assert jax.jit(lambda x: x + 1).lower(1.0).compile(options)(1.0) == 2.0
    with pytest.raises(Exception, match="No such compile option"):
        jax.jit(lambda x: x + 1).lower(1.0).compile({f"{name}_not": value for name, value in options.items()})


def test_a_program_says_once_which_backend_would_have_come_first(monkeypatch, capsys):
    monkeypatch.setitem(_PREFERRED, "cpu", ("picky", "blockwise"))
    monkeypatch.setitem(BACKENDS, "picky", types.SimpleNamespace(refusal=lambda call: "K=3 is odd"))
    program = make_program(tiny.run("lm"), jax.devices()[:1])
    for name, length in (("first", 1031), ("again", 1031), ("small", 5)):
        x = jax.ShapeDtypeStruct((1, length, 2, 3), "float32")
        program.compiled_for(name, jax.jit(lambda x: attend(x, x, x)), x)
    told = "T=1031 S=1031 H=2 G=2 K=3 V=3 float32: blockwise; picky: K=3 is odd"
    assert capsys.readouterr().err == f"note: attention {told}\n"
    assert program.attention[0] == told and len(program.attention) == 2
