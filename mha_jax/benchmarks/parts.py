"""Where a training step's time goes: each part of the model compiled and timed alone, next to its matrix products."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from mha_jax.attention.attend import attend
from mha_jax.attention.visibility import Causal
from mha_jax.benchmarks import floor
from mha_jax.models import LanguageModel, build_model
from mha_jax.models.losses import token_losses
from mha_jax.specs import RunSpec
from mha_jax.training.optimizers import make_optimizer

Call = Callable[[], object]


def _trained(module: Any, function: Callable[..., Any], *inputs: Array) -> Call:
    """The forward and backward pass of function(module, *inputs), to the module's parameters and to the inputs."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    return floor.with_backward(
        lambda params, *inputs: function(nnx.merge(graph, params, rest), *inputs), params, *inputs
    )


def _optimizer(run: RunSpec, model: LanguageModel) -> Call:
    """The update of all parameters; it reuses their memory, as the step does."""
    optimizer = make_optimizer(run.optimizer, run.model.d_model, run.training.steps)
    params = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    gradients = jax.tree.map(jnp.ones_like, params)
    state = (params, optimizer.init(params))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: Any, gradients: Any) -> Any:
        updates, moments = optimizer.update(gradients, state[1], state[0])
        return optax.apply_updates(state[0], updates), moments

    def call() -> None:
        nonlocal state
        state = jax.block_until_ready(update(state, gradients))

    return call


def model_parts(run: RunSpec, batch: dict[str, Array]) -> dict[str, tuple[int, Call]]:
    """How often each part occurs in a step of one seed, and one call of it; a block's parts are those of the first."""
    model = build_model(run, rngs=nnx.Rngs(0))
    assert isinstance(model, LanguageModel)
    block = model.decoder.blocks[0]
    keys = iter(jax.random.split(jax.random.key(0), 5))
    shape = batch["inputs"].shape

    def normal(*widths: int) -> Array:
        return jax.random.normal(next(keys), (*shape, *widths), run.model.dtype)

    heads, layers = block.attention.shape, run.model.num_layers
    H, K, V = heads.num_heads, heads.qk_dim, heads.v_dim
    x_BTD, q_BTHK, k_BTHK, v_BTHV, o_BTHV = (
        normal(run.model.d_model),
        normal(H, K),
        normal(H, K),
        normal(H, V),
        normal(H, V),
    )

    def ends(model: LanguageModel, x_BTD: Array) -> Any:
        # As the stack enters and leaves; what lies between is the other parts'.
        entered = model.decoder.enter(model.tokens.embed(batch["inputs"]), jnp.arange(shape[1]))
        return entered, jnp.mean(token_losses(model.tokens.logits(x_BTD), batch["targets"])[0])

    def norms(block: Any, x_BTD: Array, y_BTD: Array) -> Any:
        x_BTD = block.after(block.before(x_BTD, block.attention_norm), y_BTD, block.attention_norm)
        return block.after(block.before(x_BTD, block.feed_forward_norm), y_BTD, block.feed_forward_norm)

    def projections(attention: Any, x_BTD: Array, o_BTHV: Array) -> Any:
        return attention.queries(x_BTD), *attention.keys_values(x_BTD), attention.output(o_BTHV)

    core = floor.with_backward(
        lambda q, k, v: attend(q, k, v, Causal(), backend=run.model.backend), q_BTHK, k_BTHK, v_BTHV
    )
    return {
        "embedding, logits, loss": (1, _trained(model, ends, x_BTD)),
        "attention projections": (layers, _trained(block.attention, projections, x_BTD, o_BTHV)),
        "attention core": (layers, core),
        "feed-forward": (layers, _trained(block.feed_forward, lambda module, x: module(x), x_BTD)),
        "norms and residuals": (layers, _trained(block, norms, x_BTD, x_BTD)),
        "optimizer": (1, _optimizer(run, model)),
    }


def floor_parts(run: RunSpec) -> dict[str, tuple[int, Call]]:
    """The same parts' matrix products; parts without any are left out."""
    weights, heads, layers = floor.draw_weights(run), run.model.heads("decoder")[0], run.model.num_layers
    layer = weights["layers"][0]
    shape = (run.data.batch_size * run.data.length, run.model.d_model)
    x_ND = jax.random.normal(jax.random.key(3), shape, run.model.dtype)
    q, k, v = floor.project(layer, x_ND)

    def projections(layer: floor.Weights, x_ND: Array, o: Array) -> Any:
        return floor.project(layer, x_ND), jnp.matmul(o, layer["out"])

    def core(q: Array, k: Array, v: Array) -> Array:
        return floor.square(q, k, v, heads, run.data.length)

    return {
        "embedding, logits, loss": (1, floor.with_backward(jnp.matmul, x_ND, weights["logits"])),
        "attention projections": (layers, floor.with_backward(projections, layer, x_ND, v)),
        "attention core": (layers, floor.with_backward(core, q, k, v)),
        "feed-forward": (layers, floor.with_backward(floor.feed_forward, layer, x_ND)),
    }
