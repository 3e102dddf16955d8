"""PyTorch's contestant is the same model: same parameters, same loss, same step."""

from importlib.util import find_spec

import jax
import numpy as np
import pytest

from mha_jax.benchmarks.train_step import language_model, random_batch
from mha_jax.training.step import init_state, train_step

pytestmark = pytest.mark.slow
# PyTorch takes seconds to import, which those who leave these tests out should not wait for.
if find_spec("torch") is None:
    pytest.skip("PyTorch is only in requirements-bench.txt", allow_module_level=True)


def copy_kernel(linear, kernel, inputs):
    import torch

    linear.weight.data = torch.tensor(np.asarray(kernel).reshape(inputs, -1).T.copy())


def copy_norm(norm, params):
    import torch

    norm.weight.data, norm.bias.data = (torch.tensor(np.array(params[name])) for name in ("scale", "bias"))


def copy_parameters(model, params):
    """Ours into PyTorch's; a norm and a bias at their starts would hide a swap, so the caller perturbs them."""
    import torch

    model.tokens.data = torch.tensor(np.array(params["tokens"]["embedding"]))
    model.positions.data = torch.tensor(np.array(params["decoder"]["positions"]["embedding"]))
    copy_norm(model.final_norm, params["decoder"]["final_norm"])
    for layer, block in enumerate(model.blocks):
        ours = params["decoder"]["blocks"][layer]
        for name in ("query", "key", "value"):
            copy_kernel(getattr(block, name), ours["attention"][name]["kernel"], block.query.in_features)
        copy_kernel(block.out, ours["attention"]["out"]["kernel"], block.out.in_features)
        for name in ("up", "down"):
            linear = getattr(block, name)
            copy_kernel(linear, ours["feed_forward"][name]["kernel"], linear.in_features)
            linear.bias.data = torch.tensor(np.array(ours["feed_forward"][name]["bias"]))
        copy_norm(block.attention_norm, ours["attention_norm"])
        copy_norm(block.feed_forward_norm, ours["feed_forward_norm"])


def moved(state):
    """The state with every parameter off its start."""
    leaves, tree = jax.tree.flatten(state["params"])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return state | {"params": jax.tree.unflatten(tree, noisy)}


def test_loss_before_and_after_steps_is_ours():
    import torch

    from mha_jax.benchmarks import torch_lm

    run = language_model(4, num_layers=2, d_model=20, d_ff=29, length=7, batch_size=3)
    state, batch = jax.jit(lambda: moved(init_state(run)))(), random_batch(run)
    model = torch_lm.LanguageModel(run)
    params = jax.tree.map(lambda leaf: np.asarray(leaf)[0], state["params"])
    copy_parameters(model, params)
    assert sum(p.numel() for p in model.parameters()) == sum(leaf.size for leaf in jax.tree.leaves(params))
    inputs, targets = (torch.from_numpy(batch[name].astype(np.int64)) for name in ("inputs", "targets"))
    optimizer = torch_lm.optimizer_of(model, run)
    stacked = {name: leaf[None] for name, leaf in batch.items()}
    for _ in range(3):
        state, metrics = train_step(run, state, stacked)
        for group in optimizer.param_groups:  # ours warms up
            group["lr"] = float(metrics["learning_rate"][0])
        optimizer.zero_grad()
        loss = model(inputs, targets)
        loss.backward()
        optimizer.step()
        np.testing.assert_allclose(loss.item(), metrics["loss"][0], rtol=2e-5)
