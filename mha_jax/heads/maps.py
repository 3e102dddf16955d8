"""The attention maps of one example without its padding: of every head, and what a layer's heads do together."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from mha_jax.heads.capture import Batch, attentions, check_numbers, chosen_layers, kind_of
from mha_jax.heads.examples import Example
from mha_jax.heads.rollout import flow, rollout
from mha_jax.heads.tensors import capture
from mha_jax.models.transformer import Model
from mha_jax.specs import UserError

# So many weights are held at once; where all heads of all layers have more, the text is read anew for every layer.
_AT_ONCE = 2**25


class Map(NamedTuple):
    """One map: weights from a query (row) to a key (column).

    `head` is a number, or what the heads of the layer do together: "mean"; "rollout", from its positions back to
    the tokens; "flow", the same from the last layer. The residual stream counts in the last two only.
    """

    attention: str
    head: int | str
    weights_TS: Float[np.ndarray, "T S"]


def example_maps(
    model: Model,
    example: Example,
    *,
    layers: Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
    flow_tokens: int = 32,
    residual: float = 0.5,
) -> Iterator[Map]:
    """The maps of chosen attentions and heads (default: all), one attention after the other, then its "mean".

    A stack of self-attention has its "rollout" after each chosen layer, and its "flow" where it reads at most
    `flow_tokens`. Where all maps together have more than 2^25 weights, there are those of single heads only.

    Raises: UserError for an attention or head that does not exist, and a residual that is no share of 1.
    """
    names = chosen_layers(model, layers)
    for name in names:
        check_numbers(f"{name} has no head", heads, attentions(model)[name].shape.num_heads)
    if not 0 <= residual <= 1:
        raise UserError(f"residual={residual} must lie between 0 and 1: the share of the residual stream")
    if _weights_in_all(model, example) > _AT_ONCE:
        for name in names:
            chosen = None if heads is None else tuple(heads)
            weights_HTS = _trimmed(example, _weights(model, example.batch, (name,), chosen))[name]
            yield from (Map(name, h, weights_HTS[i]) for i, h in enumerate(heads or range(len(weights_HTS))))
        return
    found = _trimmed(example, _weights(model, example.batch, tuple(attentions(model)), None))
    through = _through(found, flow_tokens, residual)
    for name in names:
        weights_HTS = found[name]
        yield from (Map(name, h, weights_HTS[h]) for h in (range(len(weights_HTS)) if heads is None else heads))
        if len(weights_HTS):
            yield Map(name, "mean", weights_HTS.mean(axis=0))
        yield from (Map(name, label, weights_TS) for label, weights_TS in through.get(name, {}).items())


def _weights_in_all(model: Model, example: Example) -> int:
    sides = {name: example.sides(kind_of(name)) for name in attentions(model)}
    return sum(a.shape.num_heads * len(sides[name][0]) * len(sides[name][1]) for name, a in attentions(model).items())


@functools.partial(jax.jit, static_argnums=(2, 3))
def _weights(model: Model, batch: Batch, layers: tuple[str, ...], heads: tuple[int, ...] | None) -> dict:
    found = capture(model, batch, ("weights",), layers=layers, heads=heads)
    return {name: tensors["weights"][0] for name, tensors in found.items()}


def _trimmed(example: Example, found: dict) -> dict[str, np.ndarray]:
    sides = {name: example.sides(kind_of(name)) for name in found}
    return {name: np.asarray(x)[:, : len(sides[name][0]), : len(sides[name][1])] for name, x in found.items()}


def _through(found: dict[str, np.ndarray], flow_tokens: int, residual: float) -> dict[str, dict[str, np.ndarray]]:
    """{attention: {"rollout" and "flow": [T, T]}} of every stack of self-attention."""
    through: dict[str, dict[str, np.ndarray]] = {}
    for kind in ("encoder", "decoder"):
        stack = {name: weights_HTT for name, weights_HTT in found.items() if kind_of(name) == kind}
        if not stack:
            continue
        layers = list(stack.values())
        for name, weights_TT in zip(stack, rollout(layers, residual), strict=True):
            through[name] = {"rollout": weights_TT}
        if layers[0].shape[1] <= flow_tokens:
            through[list(stack)[-1]]["flow"] = flow(layers, residual)
    return through
