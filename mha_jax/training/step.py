"""One training step, a pure function of (state, batch). Every leaf of state and batch leads with the seed axis R.

  state = {"seed", "step", "params", "constants", "optimizer"}, and "importance" where heads are pruned as it trains

Runs of one shape may train together: then R counts the seeds of them all, and the members' rates are arguments.

`params` are nested dicts of arrays under the module's own names, so that what works on heads can index them. How the
step is spread over devices is the business of parallel.py; nothing here knows a device.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int, Key

from mha_jax.attention.routing import routes
from mha_jax.attention.target import target
from mha_jax.data import batch_shapes
from mha_jax.heads import gating, schedule
from mha_jax.models import build_model
from mha_jax.models.auxiliary import auxiliary_losses, observations
from mha_jax.models.losses import Batch, loss_sums
from mha_jax.specs import RunSpec, UserError
from mha_jax.training.optimizers import (
    Hyperparameters,
    hyperparameters,
    learning_rate,
    make_optimizer,
    with_gates_and_frozen,
)

State = dict[str, Any]
_graphs: dict[str, Any] = {}  # a tenth of a second each, and every program of a run asks
_INIT, _DROPOUT, _GATES = 0, 1, 2


def graph(run: RunSpec) -> Any:
    """The model's structure without its arrays: what `nnx.merge` needs beside params and constants."""
    if (key := repr(run)) not in _graphs:
        model = nnx.eval_shape(lambda: build_model(run, rngs=nnx.Rngs(params=0)))
        _graphs[key] = nnx.split(model, nnx.Param, ...)[0]
    return _graphs[key]


def merge(run: RunSpec, params: Any, constants: Any) -> Any:
    """The model of one seed, from the trees of its state."""
    return nnx.merge(graph(run), params, constants)


def _optimizer(run: RunSpec, given: Hyperparameters | None = None) -> optax.GradientTransformation:
    optimizer = make_optimizer(run.optimizer, run.model.d_model, run.training.steps, given)
    return with_gates_and_frozen(optimizer, run.gates, run.training.freeze or ())


def _init_one(run: RunSpec, seed: Int[Array, ""]) -> State:
    key = jax.random.fold_in(jax.random.key(seed), _INIT)
    _, params, constants = nnx.split(build_model(run, rngs=nnx.Rngs(params=key)), nnx.Param, ...)
    params, constants = nnx.to_pure_dict(params), nnx.to_pure_dict(constants)
    state = {
        "seed": seed,
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "constants": constants,
        "optimizer": _optimizer(run).init(params),
    }
    if run.gates.prune_to is not None:
        state["importance"] = jax.tree.map(jnp.zeros_like, schedule.gates_of(run, constants))
    return state


def init_state(run: RunSpec) -> State:
    """The state at step 0 of all the run's seeds, each a function of its seed alone."""
    if run.model.dtype == "float64" and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise UserError("model.dtype='float64' needs 64-bit JAX: set JAX_ENABLE_X64=1")
    return jax.vmap(functools.partial(_init_one, run))(jnp.asarray(run.seeds, jnp.int32))


def dropout_keys(seed: Int[Array, ""], step: Int[Array, ""], rows: Int[Array, "B"]) -> Key[Array, "B"]:
    """One key an example, from its row in the whole batch: the same on whatever device the example lands."""
    return jax.vmap(functools.partial(jax.random.fold_in, _step_key(seed, step, _DROPOUT)))(rows)


def _step_key(seed: Int[Array, ""], step: Int[Array, ""], use: int) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), use), step)


def _step_one(
    run: RunSpec, axis_name: str | None, state: State, batch: Batch, given: Hyperparameters
) -> tuple[State, dict[str, Array]]:
    def total(tree: Any) -> Any:
        return tree if axis_name is None else jax.lax.psum(tree, axis_name)

    uses_dropout = run.model.dropout_rate > 0 or run.model.attention_dropout_rate > 0
    keys = dropout_keys(state["seed"], state["step"], batch["row"]) if uses_dropout else None
    weight = jnp.maximum(total(jnp.sum(batch["weights"])), 1)

    def objective(params: Any, gates: schedule.Table) -> tuple[Array, Any]:
        model = merge(run, params, schedule.with_gates(state["constants"], gates))
        penalty = gating.l0_loss(run.gates, model, total)
        if run.gates.draws:
            gating.draw_gates(run.gates, model, _step_key(state["seed"], state["step"], _GATES), batch["row"])
        with routes() as found:
            sums = loss_sums(run.task, model, batch, keys, run.training.label_smoothing)
        beside = penalty | auxiliary_losses(run, model, batch, found, total)
        return sums["objective"] / weight + sum(beside.values()), (sums, beside)

    gates = schedule.gates_of(run, state["constants"])
    (grads, gate_grads), (sums, beside) = jax.grad(objective, (0, 1), has_aux=True)(state["params"], gates)
    grads, gate_grads, sums, beside = total((grads, gate_grads, sums, beside))
    updates, optimizer = _optimizer(run, given).update(grads, state["optimizer"], state["params"])
    new = {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer, "step": state["step"] + 1}
    if gates:
        new["importance"] = schedule.followed(state["importance"], gate_grads)
        closed = schedule.closed(gates, new["importance"], schedule.heads_kept(run, new["step"]))
        new["constants"] = schedule.with_gates(state["constants"], closed)
    # A step with a non-finite loss or gradient changes nothing, so that the last good state can be looked at.
    grad_norm = optax.tree.norm(grads)
    good = jnp.isfinite(grad_norm) & jnp.isfinite(sums["objective"])
    kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, {name: state[name] for name in new})
    metrics = {
        "loss": sums["loss"] / weight,
        "tokens": sums["weight"],
        "grad_norm": grad_norm,
        "learning_rate": jnp.asarray(
            learning_rate(run.optimizer, run.model.d_model, run.training.steps, given.peak)(state["step"])
        ),
        "good": good,
        **beside,
    }
    return {**state, **kept}, metrics


def train_step(
    run: RunSpec,
    state: State,
    batch: Batch,
    given: Hyperparameters | None = None,
    axis_name: str | None = None,
) -> tuple[State, dict[str, Array]]:
    """All seeds one step on. Returns the new state and per-seed metrics, each (R,).

    "loss" is the unsmoothed nats a target; "good" is False where loss or gradient was not finite: that seed's state is
    returned unchanged. Losses beside the task's, such as "balance_loss", are there as they entered the objective.

    Args: given: peak and weight decay, each (R,), of runs that train together, `run` one of them; default: the run's.
          axis_name: the batch is one shard of a larger one, and sums are taken over that axis.
    """
    given = hyperparameters([run]) if given is None else given
    return over_seeds(run, functools.partial(_step_one, run, axis_name))(state, batch, given)


def evaluate_step(run: RunSpec, params: Any, constants: Any, batch: Batch) -> dict[str, Array]:
    """Sums of loss, correct predictions and weight over one batch that all seeds see, without dropout: each (R,).

    What is observed of heads, such as "active_heads/decoder/0/attention", is a mean times the batch's weight.
    """

    def one(params: Any, constants: Any) -> dict[str, Array]:
        model = merge(run, params, constants)
        with routes() as found:
            sums = loss_sums(run.task, model, batch, None, 0.0)
        seen = observations(run, model, batch, found)
        return sums | {name: mean * sums["weight"] for name, mean in seen.items()}

    return over_seeds(run, one)(params, constants)


def over_seeds(run: RunSpec, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of one seed for all of them, over the leading axis of its arguments.

    All at once where devices are wide or the mesh splits the axis; on a CPU one after the other, in the same program:
    batched products and a larger working set would take half as long again there.
    """
    if target() == "cpu" and run.mesh.seed == 1:
        return lambda *args: jax.lax.map(lambda one: _sealed(function, one), args)
    return jax.vmap(function)


def _sealed(function: Callable[..., Any], args: Any) -> Any:
    """function(*args), compiled the same whatever is around it, so that a seed rounds alone as it does among others.

    As one branch of two, of which the compiler does not know that it is always taken: it fuses nothing into a branch.
    """
    function = jax.jit(function)  # traced once, for the shapes and for the branch
    shapes = jax.eval_shape(function, *args)
    always = jax.lax.optimization_barrier(jnp.asarray(True))
    return jax.lax.cond(always, function, lambda *_: jax.tree.map(jnp.zeros_like, shapes), *args)


def abstract_batches(run: RunSpec) -> list[Batch]:
    """Shapes of every distinct training batch, seeds stacked."""
    seeds = len(run.seeds)
    return [
        {name: jax.ShapeDtypeStruct((seeds, *leaf.shape), leaf.dtype) for name, leaf in shapes.items()}
        for shapes in batch_shapes(run.data, run.task)
    ]


def peak_bytes(compiled: Any) -> int | None:
    """Bytes that XLA plans to hold at the worst moment of a compiled program; None where it does not say."""
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    sizes = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return int(sizes + plan.temp_size_in_bytes)
