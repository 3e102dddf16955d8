"""Where a run broke: the first layer whose output, or parameter whose gradient, is not finite."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mha_jax.models.losses import Batch, loss_sums
from mha_jax.specs import RunSpec
from mha_jax.training import hosts
from mha_jax.training.step import State, merge


def _broken(tree: Any) -> str | None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not bool(jnp.isfinite(leaf).all()):
            return jax.tree_util.keystr(path, simple=True, separator="/")
    return None


def first_non_finite(run: RunSpec, state: State, index: int, batch: Batch) -> str:
    """Names what is first not finite for one seed: a parameter, a layer's output, the logits, or a gradient.

    Runs uncompiled and without dropout.

    Args: index: of the seed on the seed axis. batch: of that seed alone, [B, ...].
    """
    # A scan shows no layer's output; unrolled, the parameters are the same.
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, layers="unrolled", remat="none"))
    trees = hosts.on_host((state["params"], state["constants"]))
    params, constants = jax.tree.map(lambda leaf: leaf[index], trees)
    batch = jax.tree.map(jnp.asarray, batch)
    if name := _broken(params):
        return f"parameter {name}"
    model, found = merge(run, params, constants), []
    for stack_name in ("encoder", "decoder"):
        stack = getattr(model, stack_name, None)
        if stack is not None:
            watched = [_watch(block, f"{stack_name} layer {i}", found) for i, block in enumerate(stack.blocks)]
            object.__setattr__(stack, "blocks", watched)
    sums = loss_sums(run.task, model, batch, None, run.training.label_smoothing)
    if found:
        return f"the output of {found[0]}"
    if not bool(jnp.isfinite(sums["objective"])):
        return "the logits"

    def objective(params: Any) -> jax.Array:
        sums = loss_sums(run.task, merge(run, params, constants), batch, None, run.training.label_smoothing)
        return sums["objective"] / jnp.maximum(sums["weight"], 1)

    name = _broken(jax.grad(objective)(params))
    return f"the gradient of {name}" if name else "the step itself (dropout or the optimiser)"


def _watch(block: Any, name: str, found: list[str]) -> Any:
    def call(*args: Any, **kwargs: Any) -> jax.Array:
        output = block(*args, **kwargs)
        if not bool(jnp.isfinite(output).all()):
            found.append(name)
        return output

    return call
