"""One batch through a model, kept at every block, so that a change in one layer runs only from that layer on.

A block is compiled once for all layers, seeds and ablations of one structure; a layer's ablations run together.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from mha_jax.attention import Rule
from mha_jax.attention.visibility import Full
from mha_jax.heads.capture import Batch, attentions, chosen_layers
from mha_jax.models.blocks import Block, Stack
from mha_jax.models.losses import example_sums
from mha_jax.models.transformer import Model
from mha_jax.specs import UserError

Sums = dict[str, Array]
# The rule of self-attention and that of attention to a memory.
Rules = tuple[Rule, Rule | None]
# So many ablations of a layer are held at a time; more run in turns.
_AT_ONCE = 16


class Attended(NamedTuple):
    """The residual stream before an attention, what its heads put out, and the factors of a router, if it has one."""

    x_BTD: Array
    o_BTHV: Array
    routed: Array | None


@dataclasses.dataclass(frozen=True)
class Prefix:
    """A batch on its way through a model, evaluated: {"encoder" or "decoder": x [B, T, D] before each block}.

    The last entry of a stack is what its last block hands on. `sums` are those of `example_sums`, [B] each. `memory`
    is what a decoder attends to.
    """

    task: str
    model: Model
    batch: Batch
    inputs: dict[str, list[Array]]
    rules: dict[str, Rules]
    memory: Array | None
    sums: Sums

    def outputs(self, name: str) -> Float[Array, "B T H V"]:
        """What the heads of one attention hand to their projection, before gates.

        Raises: UserError for an attention that does not exist.
        """
        return self._attended(name).o_BTHV

    def even_outputs(self, name: str) -> Float[Array, "B T H V"]:
        """What they would hand on if every query attended evenly to the keys that it sees: the mean of their values.

        Raises: UserError for an attention that does not exist.
        """
        kind, layer, place = _place(self.model, name)
        block = nnx.clone(getattr(self.model, kind).blocks[layer])
        query = getattr(block, place).query
        nnx.update(query, jax.tree.map(jnp.zeros_like, nnx.state(query)))  # all logits are 0 then
        return _attended(block, place, self.inputs[kind][layer], *self._context(kind)).o_BTHV

    def ablate(self, name: str, gates_NH: Float[Array, "N H"], instead: Array | None = None) -> Sums:
        """Sums of `example_sums` of every example, [N, B] each, with each of N gate vectors on one attention.

          head h of attention `name` puts out gate[n,h] * o[b,t,h] + (1 - gate[n,h]) * instead[b,t,h]

        Gates multiply those that the layer has. Layers below run not at all, the layer's own attention once.

        Args:   instead: broadcasts to [B, T, H, V]; default 0.
        Raises: UserError for an attention that does not exist, or gates of other than its heads.
        """
        kind, layer, place = _place(self.model, name)
        heads = attentions(self.model)[name].shape.num_heads
        if gates_NH.shape[1:] != (heads,):
            raise UserError(f"gates of {name} have shape {gates_NH.shape}; [N, H={heads}] would do")
        if not len(gates_NH):
            return {name: sums_B[None][:0] for name, sums_B in self.sums.items()}
        attended = self._attended(name)
        block, context = getattr(self.model, kind).blocks[layer], self._context(kind)
        instead = jnp.zeros((1, 1, 1, 1), attended.o_BTHV.dtype) if instead is None else instead

        def some(gates_NH: Array) -> Sums:
            x_NBTD = _ablated(block, place, attended, instead, gates_NH, *context)
            return self._onward(kind, layer + 1, x_NBTD)

        return _in_turns(some, gates_NH)

    def _context(self, kind: str) -> tuple[Rules, Array | None]:
        return self.rules[kind], None if kind == "encoder" else self.memory

    def _attended(self, name: str) -> Attended:
        kind, layer, place = _place(self.model, name)
        block, x_BTD = getattr(self.model, kind).blocks[layer], self.inputs[kind][layer]
        return _attended(block, place, x_BTD, *self._context(kind))

    def _onward(self, kind: str, layer: int, x_NBTD: Array) -> Sums:
        """From block `layer` of a stack to the sums; ablations of an encoder run the whole decoder."""
        rules, memory = self._context(kind)
        for block in getattr(self.model, kind).blocks[layer:]:
            x_NBTD = _blocks(block, x_NBTD, rules, memory)
        if kind == "encoder" and "decoder" in self.inputs:
            memory_NBSD = _left(self.model.encoder, x_NBTD)  # pyright: ignore[reportAttributeAccessIssue]
            start_BTD = self.inputs["decoder"][0]
            x_NBTD, kind = jnp.broadcast_to(start_BTD[None], (len(x_NBTD), *start_BTD.shape)), "decoder"
            for block in self.model.decoder.blocks:  # pyright: ignore[reportAttributeAccessIssue]
                x_NBTD = _blocks(block, x_NBTD, self.rules[kind], memory_NBSD)
        return _ended(self.task, self.model, self.batch, kind, x_NBTD)


def run_prefix(task: str, model: Model, batch: Batch) -> Prefix:
    """Runs a batch through the model once, without dropout, and keeps what every block reads."""
    inputs, rules, memory = {}, {}, None
    entered, kind = _entered(task, model, batch), ""
    for kind in _kinds(model):
        stack, (x_BTD, *own) = getattr(model, kind), entered[kind]
        x_NBTD, inputs[kind], rules[kind] = x_BTD[None], [x_BTD], tuple(own)
        for block in stack.blocks:
            x_NBTD = _blocks(block, x_NBTD, rules[kind], memory)
            inputs[kind].append(x_NBTD[0])
        if kind == "encoder" and "decoder" in entered:
            memory = _left(stack, x_NBTD)[0]
    sums = _ended(task, model, batch, kind, inputs[kind][-1][None])
    return Prefix(task, model, batch, inputs, rules, memory, {name: x_NB[0] for name, x_NB in sums.items()})


def with_gates(model: Model, gates: Mapping[str, Array]) -> Model:
    """A copy of the model in which the gates of the attentions named are multiplied by those given."""
    gated = nnx.clone(model)
    for name, gate in gates.items():
        layer = attentions(gated)[name]
        layer.gate[...] = layer.gate[...] * gate.astype(layer.gate.dtype)
    return gated


class _Stub:
    """Stands where a stack does, and answers with `answer(*what the stack was given)`."""

    def __init__(self, answer: Callable[..., Array]) -> None:
        self.answer = answer

    def __call__(self, *given: Any, dropout_keys: None = None) -> Array:
        return self.answer(*given)


def _stubbed(model: Model, answers: Mapping[str, Callable[..., Array]]) -> Model:
    """The model with stacks that do nothing but answer: what it does around them is its own code."""
    stubbed = nnx.clone(model, variables=False)
    for kind, answer in answers.items():
        setattr(stubbed, kind, _Stub(answer))
    return stubbed


@functools.partial(jax.jit, static_argnums=0)
def _entered(task: str, model: Model, batch: Batch) -> dict[str, tuple[Array, Rule, Rule | None]]:
    """What the first block of each stack reads, and by which rules."""
    found = {}

    def see(kind: str, stack: Stack, x: Array, rule: Rule, memory: Any = None, memory_rule: Any = None) -> Array:
        found[kind] = stack.enter(x, jnp.arange(x.shape[1])), rule, memory_rule
        return x

    answers = {kind: functools.partial(see, kind, getattr(model, kind)) for kind in _kinds(model)}
    example_sums(task, _stubbed(model, answers), batch)
    return found


@functools.partial(jax.jit, static_argnums=1)
def _attended(block: Block, place: str, x_BTD: Array, rules: Rules, memory: Array | None) -> Attended:
    """One attention of a block up to its projection."""
    visibility, memory_visibility = rules
    if place == "cross_attention":
        x_BTD, visibility = block.attend(x_BTD, visibility), memory_visibility or Full()
    layer, found = nnx.clone(getattr(block, place), variables=False), []

    def see(o_BTHV: Array, gate: Array | None = None) -> Array:
        found.append(Attended(x_BTD, o_BTHV, gate))
        return x_BTD

    # Here and not around the call, so that whatever computes the heads is the layer's own code.
    layer.output = see
    y_BTD = block.before(x_BTD, getattr(block, f"{place}_norm"))
    layer(y_BTD, memory if place == "cross_attention" else None, visibility=visibility)
    return found[0]


@functools.partial(jax.jit, static_argnums=1)
def _ablated(
    block: Block,
    place: str,
    attended: Attended,
    instead: Array,
    gates_NH: Array,
    rules: Rules,
    memory: Array | None,
) -> Float[Array, "N B T D"]:
    """What a block hands on with each gate vector on what the heads of one of its attentions put out."""
    x_BTD, o_BTHV, routed = attended

    def one(gate_H: Array) -> Array:
        gate = gate_H.reshape(1, 1, -1, 1)
        mixed = (gate * o_BTHV + (1 - gate) * instead).astype(o_BTHV.dtype)
        y_BTD = block.after(x_BTD, getattr(block, place).output(mixed, routed), getattr(block, f"{place}_norm"))
        if place == "attention" and memory is not None:
            read = block.before(y_BTD, block.cross_attention_norm)
            read = block.cross_attention(read, memory, visibility=rules[1] or Full())
            y_BTD = block.after(y_BTD, read, block.cross_attention_norm)
        return block.feed(y_BTD)

    return _each(one)(gates_NH)


@jax.jit
def _blocks(block: Block, x_NBTD: Array, rules: Rules, memory: Array | None) -> Float[Array, "N B T D"]:
    """One block on N streams, that read one memory, [B, S, D], or each its own, [N, B, S, D]."""

    def one(x_BTD: Array, memory: Array | None) -> Array:
        return block(x_BTD, rules[0], memory, rules[1])

    if memory is None or memory.ndim == 3:
        return _each(lambda x_BTD: one(x_BTD, memory))(x_NBTD)
    return _each(lambda pair: one(*pair))((x_NBTD, memory))


@jax.jit
def _left(stack: Stack, x_NBTD: Array) -> Float[Array, "N B T D"]:
    return _each(stack.leave)(x_NBTD)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _ended(task: str, model: Model, batch: Batch, kind: str, x_NBTD: Array) -> Sums:
    """Sums of every example from what the last block handed on, [N, B] each."""

    def one(x_BTD: Array) -> Sums:
        stack = getattr(model, kind)
        # An encoder before this stack has been read: whatever stands for its output is not used.
        answers = {"encoder": lambda x, *_: x, kind: lambda *_: stack.leave(x_BTD)}
        return example_sums(task, _stubbed(model, {name: answers[name] for name in _kinds(model)}), batch)

    return _each(one)(x_NBTD)


def _each(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The function over the leading axis: all at once where devices are wide, in turns on a CPU."""
    if jax.default_backend() == "cpu":
        return functools.partial(lax.map, function)
    return jax.vmap(function)


def _in_turns(function: Callable[[Array], Sums], gates_NH: Array) -> Sums:
    """Sums of every gate vector, so many at a time; the last turn is filled up, so that one program serves all."""
    count = len(gates_NH)
    if count <= _AT_ONCE:
        return function(gates_NH)
    filled = jnp.concatenate([gates_NH, jnp.ones((-count % _AT_ONCE, gates_NH.shape[1]), gates_NH.dtype)])
    parts = [function(filled[start : start + _AT_ONCE]) for start in range(0, count, _AT_ONCE)]
    return {name: jnp.concatenate([part[name] for part in parts])[:count] for name in parts[0]}


def _kinds(model: Model) -> list[str]:
    """The stacks of a model, in the order of the forward pass."""
    return [kind for kind in ("encoder", "decoder") if hasattr(model, kind)]


def _place(model: Model, name: str) -> tuple[str, int, str]:
    """Stack, layer and place of an attention's name. Raises: UserError where there is none of this name."""
    chosen_layers(model, [name])
    kind, layer, place = name.split("/")
    return kind, int(layer), place
