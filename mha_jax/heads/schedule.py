"""Heads that go one by one while the model trains, the least important first (gradual pruning, Zhu and Gupta 2017)."""

import itertools
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int

from mha_jax.heads.capture import kind_of
from mha_jax.specs import RunSpec

_DECAY = 0.98  # of the running mean of importance: it forgets in some fifty steps
Table = dict[str, Array]


def gates_of(run: RunSpec, constants: Any) -> Table:
    """The gates that the schedule may close, {attention: [H]}, out of the constants of one seed's state."""
    if run.gates.prune_to is None:
        return {}
    gates = {_name(path): leaf for path, leaf in flatten_dict(constants).items() if path[-1] == "gate"}
    return {name: jnp.asarray(gate) for name, gate in gates.items() if kind_of(name) in run.gated_kinds}


def with_gates(constants: Any, gates: Table) -> Any:
    """The constants with these gates in place of their own."""
    if not gates:
        return constants
    flat = flatten_dict(constants)
    return unflatten_dict({p: gates.get(_name(p), leaf) if p[-1] == "gate" else leaf for p, leaf in flat.items()})


def followed(importance: Table, gradients: Table) -> Table:
    """The running mean, over steps, of |dL/dgate| of the batch's loss at each head's gate."""
    return {name: _DECAY * old + (1 - _DECAY) * jnp.abs(gradients[name]) for name, old in importance.items()}


def heads_kept(run: RunSpec, step: Int[Array, ""] | int) -> Int[Array, ""]:
    """How many of the N heads are left after `step` steps (Zhu and Gupta 2017, eq. 1, in heads left).

    n(t) = n_end + (N - n_end) (1 - (t - start) / (end - start))^3, rounded up; N before start, n_end from end on
    """
    total, left = run.gated_heads, run.gates.heads_left(run.gated_heads)
    start, end = run.gates.prune_start, run.prune_end
    done = jnp.clip((jnp.asarray(step, jnp.float32) - start) / (end - start), 0, 1)
    # Rounding of float32 must not keep one head more than the formula's whole numbers.
    return jnp.ceil(left + (total - left) * (1 - done) ** 3 - 1e-3).astype(jnp.int32)


def closed(gates: Table, importance: Table, kept: Int[Array, ""]) -> Table:
    """The gates with all but the `kept` most important heads set to 0; one that is 0 stays 0.

    Importance is compared after division by its l2 norm over the attention's heads (Michel et al. 2019, section 4.1).
    Of equally important heads the first stay.
    """
    score_N = jnp.concatenate([_scores(gate_H, importance[name]) for name, gate_H in gates.items()])
    rank_N = jnp.argsort(jnp.argsort(-score_N, stable=True), stable=True)
    ends = list(itertools.accumulate(gate_H.size for gate_H in gates.values()))
    ranks = jnp.split(rank_N, ends[:-1])
    return {name: jnp.where(rank < kept, gate, 0) for (name, gate), rank in zip(gates.items(), ranks, strict=True)}


def _scores(gate_H: Float[Array, " H"], importance_H: Float[Array, " H"]) -> Float[Array, " H"]:
    unit_H = importance_H / jnp.maximum(jnp.linalg.norm(importance_H), jnp.finfo(importance_H.dtype).tiny)
    return jnp.where(gate_H != 0, unit_H, -1)


def _name(path: tuple[Any, ...]) -> str:
    """("encoder", "blocks", 0, "attention", "gate") is the gate of "encoder/0/attention"."""
    stack, _, layer, place, _ = path
    return f"{stack}/{layer}/{place}"
