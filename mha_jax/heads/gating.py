"""The gates of a model's heads: what they are, how many heads they leave, and those that a training step draws."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mha_jax.attention.gates import HardConcreteGate, drop_heads, uniform
from mha_jax.attention.multihead import Gate, MultiHeadAttention
from mha_jax.heads.capture import attentions, kind_of
from mha_jax.models.transformer import Model
from mha_jax.specs import GatesSpec


def head_gates(model: Model) -> dict[str, Float[Array, " H"]]:
    """The factor of every head in evaluation, by attention."""
    return {name: layer.head_gate() for name, layer in attentions(model).items()}


def alive(model: Model) -> dict[str, Bool[Array, " H"]]:
    """Which heads do anything: those whose gate is not exactly 0. The others can be removed."""
    return {name: gate_H != 0 for name, gate_H in head_gates(model).items()}


def heads_alive(model: Model) -> dict[str, Int[Array, ""]]:
    """How many heads do anything: "heads_alive" in all, and "heads_alive/encoder" and so on by kind."""
    counts: dict[str, Array] = {"heads_alive": jnp.zeros((), jnp.int32)}
    for name, alive_H in alive(model).items():
        for counted in ("heads_alive", f"heads_alive/{kind_of(name)}"):
            counts[counted] = counts.get(counted, 0) + alive_H.sum(dtype=jnp.int32)
    return counts


def l0_loss(spec: GatesSpec, model: Model, total: Callable[[Any], Any]) -> dict[str, Float[Array, ""]]:
    """What hard-concrete gates add to the objective, in nats a target: {"l0_loss": this shard's part}, or {}.

      sum over kinds of l0_weight * sum over the kind's heads of P(gate is not 0)     (Voita et al. 2019, section 6.1)

    Args: total: adds up over shards.
    """
    if spec.kind != "hard_concrete":
        return {}
    gates = _hard_concrete(model)
    terms = [spec.weight(kind_of(name)) * gate.open_probability().sum() for name, gate in gates.items()]
    return {"l0_loss": sum(terms, jnp.zeros(())) / total(jnp.ones(()))}


def draw_gates(spec: GatesSpec, model: Model, key: Key[Array, ""], rows: Int[Array, " B"]) -> None:
    """Puts the gates of one training step into `model`, in place of those that evaluate.

    Hard-concrete gates are drawn once for the whole batch, as in the paper; dropped heads for each example.

    Args: key: of seed and step. rows: of the examples in the whole batch, so that no device draws otherwise.
    """
    if spec.kind == "hard_concrete":
        _draw_hard_concrete(model, jax.random.fold_in(key, 0))
    if spec.head_drop_rate:
        _drop_heads(spec, model, jax.random.fold_in(key, 1), rows)


def _draw_hard_concrete(model: Model, key: Key[Array, ""]) -> None:
    gates = _hard_concrete(model)
    ends = list(itertools.accumulate(gate.log_alpha.size for gate in gates.values()))
    dtype = next(iter(gates.values())).log_alpha.dtype
    # One draw for all layers: many small ones take a noticeable part of a small model's step.
    parts = jnp.split(uniform(key, ends[-1], dtype), ends[:-1])
    for (name, gate), uniform_H in zip(gates.items(), parts, strict=True):
        layer = attentions(model)[name]
        layer.gate, layer.learned_gate = Gate(layer.gate[...] * gate.drawn(uniform_H)), None


def _drop_heads(spec: GatesSpec, model: Model, key: Key[Array, ""], rows: Int[Array, " B"]) -> None:
    for number, (name, layer) in enumerate(attentions(model).items()):
        if spec.where is None or kind_of(name) in spec.where:
            keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, number), rows)
            factor_BH = drop_heads(keys_B, layer.shape.num_heads, spec.head_drop_rate)
            gate_H = layer.gate[...]
            layer.gate = Gate(gate_H[None] * factor_BH.astype(gate_H.dtype))


def _hard_concrete(model: Model) -> dict[str, HardConcreteGate]:
    layers: dict[str, MultiHeadAttention] = attentions(model)
    found = {name: layer.learned_gate for name, layer in layers.items()}
    return {name: gate for name, gate in found.items() if isinstance(gate, HardConcreteGate)}
