"""Contestants of JAX: one batch over several devices gives what one device gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax.benchmarks import programs
from mha_jax.specs import UserError


def layer(shared, inputs):
    """Its gradient to `shared` mixes all examples of the batch."""
    return jnp.tanh(inputs["x"] @ shared["w"]) * inputs["scale"][:, None]


def arguments():
    w, x, cotangent = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(3, 5), (6, 3), (6, 5)]))
    return {"w": w}, {"x": x, "scale": jnp.arange(1.0, 7.0)}, cotangent


def test_gradients_of_shared_arrays_are_summed_over_devices_and_the_rest_stays_in_place():
    shared, inputs, cotangent = arguments()
    both = programs.forward_backward(layer)
    whole = both(shared, (inputs, cotangent))
    devices = jax.devices()[:3]
    run = programs.spread(both, devices)
    shared_out = run(*programs.place(shared, (inputs, cotangent), devices))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, shared_out)
    assert len(shared_out[0][0].sharding.device_set) == 3


def test_forward_backward_is_the_gradient_of_the_inner_product_with_the_cotangent():
    shared, inputs, cotangent = arguments()
    (y, of_inputs), of_shared = programs.forward_backward(layer)(shared, (inputs, cotangent))
    by_hand = jax.grad(lambda s, i: jnp.sum(layer(s, i) * cotangent), argnums=(0, 1))(shared, inputs)
    np.testing.assert_array_equal(y, layer(shared, inputs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), (of_shared, of_inputs), by_hand)


@pytest.mark.parametrize("mode", [programs.FORWARD, programs.BOTH])
def test_a_program_returns_finished_results_and_its_plan_counts_every_device(mode):
    shared, inputs, cotangent = arguments()
    one, two = (programs.program(layer, mode, shared, inputs, cotangent, jax.devices()[:n]) for n in (1, 2))
    split, _ = two.call()
    y = split if mode == programs.FORWARD else split[0]
    np.testing.assert_allclose(y, layer(shared, inputs), rtol=1e-5)
    assert one.peak_bytes and two.peak_bytes and two.peak_bytes >= one.peak_bytes


def test_some_calls_are_started_one_after_the_other_and_only_the_last_is_waited_for():
    told = []

    def start():
        told.append("start")
        return len(told)

    one = programs.Program(start, lambda result: told.append(f"wait for {result}"), None)
    one.call(3)
    assert told == ["start", "start", "start", "wait for 3"]


@pytest.mark.parametrize(("batch", "used"), [(4, 4), (6, 6), (5, 5), (16, 8), (9, 3), (11, 1)])
def test_the_batch_goes_to_as_many_devices_as_share_it_evenly(batch, used):
    assert len(programs.share_out(batch, jax.devices()[:8])) == used


def test_more_devices_than_there_are_is_refused_with_their_number():
    assert programs.use_devices(2) == jax.devices()[:2]
    assert programs.use_devices(None) == jax.devices()
    with pytest.raises(UserError, match=f"devices=999 must be between 1 and the {len(jax.devices())}"):
        programs.use_devices(999)


def test_types_and_modes_are_checked_by_name():
    assert programs.chosen_dtype(None) == "float32"
    with pytest.raises(UserError, match="dtype='int8' is not one of"):
        programs.chosen_dtype("int8")
    with pytest.raises(UserError, match="modes='sideways' is not one of 'forward', 'forward\\+backward'"):
        programs.check_modes(("forward", "sideways"))
