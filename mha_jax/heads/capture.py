"""Looks into every attention of a model while it reads one batch; what the model computes stays the same.

An attention goes by the name of its stack, its layer from 0, and its place in it: "decoder/3/attention",
"decoder/3/cross_attention", "encoder/0/attention". A batch is what training takes, for one seed: a dict with "inputs"
(and "segments"), or "source", "source_lengths" and "target_inputs", or for models that only encode "inputs" and
"lengths", each with "weights".
All of this also works under `jax.jit` and `jax.vmap`, and is much the quicker there.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from mha_jax.attention import MultiHeadAttention, Rule
from mha_jax.attention.statistics import HeadStatistics, attend_with_statistics, attention_weights
from mha_jax.models import LanguageModel, TranslationModel
from mha_jax.models.transformer import Model
from mha_jax.specs import UserError

Batch = dict[str, Any]


class Attended(NamedTuple):
    """One attention at work: the layer, its queries, keys and values, and which keys a query sees."""

    layer: MultiHeadAttention
    q_BTHK: Array
    k_BSGK: Array
    v_BSGV: Array
    visibility: Rule
    dropout_keys: Array | None = None


class HeadSums(NamedTuple):
    """Statistics of each head, float32 [H], summed over real queries, and how many those were.

    Sums of several batches add up: `jax.tree.map(jnp.add, one, other)`.
    """

    sums: HeadStatistics
    count: Array

    @property
    def mean(self) -> HeadStatistics:
        """The mean over queries, [H] each; 0 where there were none."""
        return HeadStatistics(*(x / jnp.maximum(self.count, 1) for x in self.sums))


def attentions(model: Model) -> dict[str, MultiHeadAttention]:
    """Every attention of a model by its name, in the order of the forward pass."""
    return {name: getattr(block, place) for name, block, place in _places(model)}


def kind_of(name: str) -> str:
    """The kind of the attention of this name: "encoder" or "decoder" (of themselves), or "cross"."""
    stack, _, place = name.split("/")
    return "cross" if place == "cross_attention" else stack


def layer_of(name: str) -> int:
    """The layer of the attention of this name, from 0."""
    return int(name.split("/")[1])


def watch(
    model: Model,
    batch: Batch,
    look: Callable[[str, Attended], Any],
    layers: Sequence[str] | None = None,
    dropout_keys: Array | None = None,
) -> tuple[Array, dict[str, Any]]:
    """The model's output, and {name: look(name, attended)} of the chosen attentions (default: all).

    There is dropout only where `dropout_keys`, one an example, are given: the same as in a call of the model.

    A model that scans or rematerialises its layers runs the same parameters one layer after the other.

    Raises: UserError for an attention that does not exist, and for one that is more than queries, keys and a rule.
    """
    chosen, found = chosen_layers(model, layers), {}
    _check_plain({name: layer for name, layer in attentions(model).items() if name in chosen})

    def see(name: str, attended: Attended) -> None:
        found[name] = look(name, attended)

    watched = nnx.clone(model, variables=False)
    for stack in _stacks(watched).values():
        # What a scan or a checkpoint traces could not be handed out.
        stack.layers, stack.remat = "unrolled", "none"
    for name, block, place in _places(watched):
        if name in chosen:
            setattr(block, place, _Watched(name, getattr(block, place), see))
    return _run(watched, batch, dropout_keys), found


def head_statistics(model: Model, batch: Batch) -> dict[str, HeadSums]:
    """Statistics of every attention's heads over the real queries of a batch, in memory that grows with its length.

    Queries of the decoder are real where "weights" is above 0 (everywhere, if it is left out); those of the encoder
    within the length of a row that has such a weight. `.mean` of each is [H], in the units of `HeadStatistics`.
    """

    def look(name: str, attended: Attended) -> HeadSums:
        layer, q_BTHK, k_BSGK, v_BSGV, visibility, _ = attended
        groups = layer.shape.head_to_group
        _, found = attend_with_statistics(q_BTHK, k_BSGK, v_BSGV, visibility, head_to_group=groups)
        real_BT = real[name.split("/")[0]]
        sums = (jnp.where(real_BT[:, :, None], x_BTH, 0).sum(axis=(0, 1)) for x_BTH in found)
        return HeadSums(HeadStatistics(*sums), real_BT.sum())

    real = real_queries(model, batch)
    return watch(model, batch, look)[1]


def attention_maps(
    model: Model,
    batch: Batch,
    *,
    layers: Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
    examples: Sequence[int] | None = None,
) -> dict[str, Float[Array, "b h T S"]]:
    """The attention weights of chosen attentions, heads and examples (default: all), recomputed from q and k.

    Returns: {name: float32 [b, h, T, S]} in the order asked for; weights are those before dropout and gates.
    Raises:  UserError for an attention, head or example that does not exist.
    """
    names = chosen_layers(model, layers)
    for name in names:
        check_numbers(f"{name} has no head", heads, attentions(model)[name].shape.num_heads)
    check_numbers("the batch has no example", examples, num_examples(model, batch))

    def look(name: str, attended: Attended) -> Array:
        layer, q_BTHK, k_BSGK, _, visibility, _ = attended
        groups = layer.shape.head_to_group
        return attention_weights(q_BTHK, k_BSGK, visibility, head_to_group=groups, heads=heads, examples=examples)

    found = watch(model, batch, look, names)[1]
    return {name: found[name] for name in names}


class _Watched:
    """Stands where an attention does: gives the same output, and shows what went into it."""

    def __init__(self, name: str, layer: MultiHeadAttention, see: Callable[[str, Attended], None]) -> None:
        self.name, self.layer, self.see = name, layer, see

    def __call__(
        self, x: Array, memory: Array | None = None, *, visibility: Rule, dropout_key: Array | None = None
    ) -> Array:
        q, (k, v) = self.layer.queries(x), self.layer.keys_values(x if memory is None else memory)
        self.see(self.name, Attended(self.layer, q, k, v, visibility, dropout_key))
        # The layer runs on its own backend: the pass that measures may round otherwise.
        return self.layer(x, memory, visibility=visibility, dropout_key=dropout_key)


def _stacks(model: Model) -> dict[str, Any]:
    return {kind: getattr(model, kind) for kind in ("encoder", "decoder") if hasattr(model, kind)}


def _places(model: Model) -> list[tuple[str, Any, str]]:
    """Name, block and attribute of every attention."""
    return [
        (f"{kind}/{layer}/{place}", block, place)
        for kind, stack in _stacks(model).items()
        for layer, block in enumerate(stack.blocks)
        for place in ("attention", "cross_attention")
        if hasattr(block, place)
    ]


def chosen_layers(model: Model, layers: Sequence[str] | None) -> list[str]:
    """The names asked for, or of all attentions. Raises: UserError for an attention that does not exist."""
    present = list(attentions(model))
    chosen = present if layers is None else list(layers)
    for name in chosen:
        if name not in present:
            raise UserError(f"there is no attention {name!r}; there are {', '.join(present)}")
    return chosen


def _check_plain(layers: dict[str, MultiHeadAttention]) -> None:
    for name, layer in layers.items():
        for part, field in ((layer.router, "model.routing"), (layer.span, "model.adaptive_span")):
            if part is not None:
                raise UserError(
                    f"{name} has {field}, which changes what its heads do for each token: its weights and outputs "
                    f"cannot be watched yet; importance by gradient and by leave_one_out works on it"
                )


def num_examples(model: Model, batch: Batch) -> int:
    """The rows of a batch, padding included."""
    return len(_inputs(model, batch)[0])


def check_numbers(fault: str, numbers: Sequence[int] | None, count: int) -> None:
    """Raises UserError, beginning with `fault`, for a number that is not from 0 to count - 1."""
    for number in () if numbers is None else numbers:
        if not 0 <= number < count:
            raise UserError(
                f"{fault} {number}; " + (f"there are {count}, 0 to {count - 1}" if count else "there are none")
            )


def _inputs(model: Model, batch: Batch) -> tuple[Any, ...]:
    names = ("inputs", "lengths")
    if isinstance(model, LanguageModel):
        names = ("inputs",)
    elif isinstance(model, TranslationModel):
        names = ("source", "source_lengths", "target_inputs")
    return tuple(batch[name] for name in names)


def _run(model: Model, batch: Batch, dropout_keys: Array | None) -> Array:
    inputs = _inputs(model, batch)
    if isinstance(model, LanguageModel):
        return model(*inputs, segments=batch.get("segments"), dropout_keys=dropout_keys)
    return model(*inputs, dropout_keys=dropout_keys)


def real_queries(model: Model, batch: Batch) -> dict[str, Bool[Array, "B T"]]:
    """Which positions of each stack are no padding."""
    tokens_BT, *others = _inputs(model, batch)
    weights = batch.get("weights")
    if isinstance(model, LanguageModel):
        return {"decoder": jnp.ones(tokens_BT.shape, bool) if weights is None else jnp.asarray(weights) > 0}
    lengths_B = jnp.asarray(others[0])
    real_BT = jnp.arange(tokens_BT.shape[1])[None, :] < lengths_B[:, None]
    if weights is None:
        weights = jnp.ones(others[1].shape if len(others) > 1 else lengths_B.shape)
    counted = jnp.asarray(weights) > 0
    counted_B1 = counted.reshape(len(tokens_BT), -1).any(axis=1, keepdims=True)
    return {"encoder": real_BT & counted_B1, "decoder": counted}
