"""The attention benchmark compares like with like: every contestant is the same layer, on the same parameters."""

import functools

import jax
import numpy as np
import pytest

from mha_jax.benchmarks import attention, floor, peers_jax, programs
from mha_jax.benchmarks.train_step import language_model
from tests.benchmarks.test_floor import dot_flops

B, T, D = 3, 14, 12
X, COTANGENT = jax.random.normal(jax.random.key(0), (2, B, T, D))


def outcome(layer, params):
    (y, dx), dparams = jax.jit(programs.forward_backward(layer))(params, (X, COTANGENT))
    return {"y": y, "x": dx, **{name: dparams[name]["kernel"] for name in ("query", "key", "value", "out")}}


def layers(num_heads):
    ours, params = peers_jax.our_layer(D, num_heads, "einsum", "float32")
    return ours, params, peers_jax.jax_nn_layer(None), peers_jax.flax_layer(D, num_heads, "float32")


@pytest.mark.parametrize("num_heads", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_peers_of_jax_give_our_output_and_our_gradients(num_heads):
    ours, params, *peers = layers(num_heads)
    wanted = outcome(ours, params)
    for peer in peers:
        for name, value in outcome(peer, params).items():
            np.testing.assert_allclose(value, wanted[name], atol=2e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("core", ["PyTorch SDPA", "PyTorch eager"])
def test_peers_of_pytorch_give_our_output_and_our_gradients(core):
    torch = pytest.importorskip("torch", reason="PyTorch is only in requirements-bench.txt")
    from mha_jax.benchmarks import peers_torch

    assert {*peers_torch.CORES, *peers_torch.GPU_CORES} <= {*attention.NAMES}
    ours, params, *_ = layers(4)
    layer = peers_torch.Layer(params, peers_torch.CORES[core](T, "cpu"))
    x = torch.tensor(np.array(X), requires_grad=True)
    y = layer(x)
    y.backward(torch.tensor(np.array(COTANGENT)))
    wanted = outcome(ours, params)
    np.testing.assert_allclose(y.detach(), wanted["y"], atol=2e-5)
    np.testing.assert_allclose(x.grad, wanted["x"], atol=2e-5)
    for name in ("query", "key", "value", "out"):
        module = getattr(layer, name)
        np.testing.assert_allclose(module.weight.grad.T.reshape(wanted[name].shape), wanted[name], atol=2e-5)


@pytest.mark.parametrize("mode", [programs.FORWARD, programs.BOTH])
def test_the_floor_has_the_products_of_causal_attention_and_no_more(mode):
    run = language_model(3, num_layers=1, d_model=D, length=T, d_ff=1)
    weights = floor.draw_weights(run)["layers"][0]
    kernels = {name: weights[name] for name in ("query", "key", "value", "out")}
    layer = functools.partial(floor.causal_layer, heads=run.model.heads("decoder")[0])
    function = {programs.FORWARD: programs.forward, programs.BOTH: programs.forward_backward}[mode](layer)
    jaxpr = jax.make_jaxpr(function)(kernels, (X, COTANGENT)).jaxpr
    setting = attention.Setting(heads=(3,), batch_size=B, length=T, d_model=D)
    assert dot_flops(jaxpr) == attention.causal_flops(setting, mode)


def test_causal_flops_are_projections_and_half_of_both_squares():
    setting = attention.Setting(heads=(1,), batch_size=2, length=8, d_model=6)
    projections, squares = 4 * (2 * 16 * 6 * 6), 2 * (2 * 2 * 8 * 8 * 6) // 2
    assert attention.causal_flops(setting, programs.FORWARD) == projections + squares
    assert attention.causal_flops(setting, programs.BOTH) == 3 * (projections + squares)


def test_a_contestant_that_cannot_run_leaves_one_line_for_all_its_head_counts():
    setting = attention.Setting(heads=(1, 4), batch_size=B, length=T, d_model=D)

    def refuse():
        raise RuntimeError("no backward\n  here")

    cells = [attention._Cell(setting, heads, programs.BOTH, "float32", jax.devices()[:1]) for heads in (1, 4)]
    for cell in cells:
        cell.enter("jax.nn", refuse, Exception)
        assert cell.programs == {}
    assert attention._notes(cells) == [
        "jax.nn does not run forward+backward at 1, 4 heads: RuntimeError: no backward here"
    ]
    with pytest.raises(RuntimeError):
        cells[0].enter("mha_jax einsum", refuse, ValueError)


def test_contestants_are_chosen_by_words_of_their_names_and_ours_and_the_floor_always_run():
    setting = attention.Setting(contestants=("jax.nn",))
    names = ("mha_jax auto", "mha_jax einsum", "matmul floor", "jax.nn", "jax.nn on one device", "PyTorch SDPA")
    assert [name for name in names if setting.wants(name)] == [names[0], *names[2:5]]


def test_ratios_are_taken_round_by_round_against_peers_and_against_the_fewest_heads(monkeypatch):
    of_two_calls = {1: [4.0, 2.0, 8.0], 4: [6.0, 8.0, 8.0]}
    call = programs.Program(lambda: None, lambda result: result, 7)
    monkeypatch.setattr(attention, "matmul_rates", lambda *_: {"JAX on one device": 10.0})
    monkeypatch.setattr("mha_jax.benchmarks.environment.torch_device", lambda: None)
    for name in ("enter_jax_peers", "enter_floor"):
        monkeypatch.setattr(attention._Cell, name, lambda cell: None)
    monkeypatch.setattr(
        attention._Cell, "enter_ours", lambda c: c.programs.update({attention.OURS: call, attention.FLOOR: call})
    )
    monkeypatch.setattr(
        attention,
        "race",
        lambda calls, _: {key: of_two_calls[key[1]] if key[2] == attention.OURS else [2.0] * 3 for key in calls},
    )
    setting = attention.Setting(heads=(4, 1), modes=("forward",), batch_size=B, length=T, d_model=D, devices=1, calls=2)
    result = attention.measure(setting)
    four, one = result["rows"]
    assert four["over_fewest_heads"] == {"median": 1.5, "min": 1.0, "max": 4.0}
    assert one["over_fewest_heads"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert four["ratio"] == {attention.FLOOR: {"median": 4.0, "min": 3.0, "max": 4.0}}
    assert four["rate_share"] == pytest.approx(attention.causal_flops(setting, "forward") / 4.0 / 10e9)
    assert result["notes"] == [attention.NO_TORCH]
