"""What the layouts of all families need to know of a model, and the head map that config.json carries for uneven ones.

A model whose layers have heads of their own is written with `"mha_jax": {"heads": [{"num_heads": 3, ...}, ...]}`, an
entry a layer, the fields of `HeadShape`. Other libraries cannot build such a model; without pruning it is left out.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mha_jax import config as configs
from mha_jax.models.cost import matched_d_ff
from mha_jax.pretrained.directory import Tensors
from mha_jax.specs import ATTENTION_KINDS, HeadShape, RunSpec, UserError

# Theirs by erf is "gelu"; ours is the approximation by tanh. The first that maps to one of ours is written.
_ACTIVATIONS = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "relu": "relu",
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a model of one stack, and the heads of each of its layers."""

    d_model: int
    d_ff: int
    vocab_size: int
    max_length: int
    heads: tuple[HeadShape, ...]


def sizes_of(run: RunSpec) -> Sizes:
    """The sizes of a run's model."""
    model, (kind,) = run.model, ATTENTION_KINDS[run.task]
    return Sizes(model.d_model, matched_d_ff(run), run.data.tokens, model.max_length, model.heads(kind))


def layers(config: Mapping[str, Any], num_layers: int, shape: Callable[[], HeadShape]) -> tuple[HeadShape, ...]:
    """The heads of each layer: those of the head map, or all `shape`. Raises: UserError for a map that does not fit."""
    found = config.get("mha_jax", {}).get("heads")
    if found is None:
        return (shape(),) * num_layers
    if len(found) != num_layers:
        raise UserError(f"config.json: mha_jax.heads lists {len(found)} layers; the model has {num_layers}")
    width = config["hidden_size"] if "hidden_size" in config else config["n_embd"]
    names = [field.name for field in dataclasses.fields(HeadShape)]
    for layer, one in enumerate(found):
        if sorted(one) != sorted(names):
            raise UserError(
                f"config.json: mha_jax.heads of layer {layer} has {sorted(one)}; wanted are {sorted(names)}"
            )
    maps = [{**one, "head_to_group": one["head_to_group"] and tuple(one["head_to_group"])} for one in found]
    return tuple(HeadShape.resolve(width, **one) for one in maps)


def model_fields(sizes: Sizes) -> dict[str, Any]:
    """The fields of `ModelSpec` that say the same; every layer written out where they differ."""
    found: dict[str, Any] = {"num_layers": len(sizes.heads)}
    found |= {name: getattr(sizes, name) for name in ("d_model", "d_ff", "max_length")}
    for field in dataclasses.fields(HeadShape):
        values = [getattr(shape, field.name) for shape in sizes.heads]
        found[field.name] = values[0] if len(set(sizes.heads)) == 1 else values
    return found


def head_map(sizes: Sizes, shape: HeadShape) -> dict[str, Any]:
    """What config.json says beside the fields of its family: nothing where all layers are of this shape."""
    if all(one == shape for one in sizes.heads):
        return {}
    return {"mha_jax": {"heads": [configs.plain(dataclasses.asdict(one)) for one in sizes.heads]}}


def number(config: Mapping[str, Any], name: str) -> int:
    """A size of config.json. Raises: UserError where it is missing or no positive integer."""
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise UserError(f"config.json: {name}={value!r} must be a positive integer")
    return value


def refuse(config: Mapping[str, Any], wanted: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises: UserError for a field that asks for what our models cannot do; the first value is the default."""
    for name, values in wanted.items():
        if config.get(name, values[0]) not in values:
            raise UserError(f"config.json: {name}={config[name]!r} cannot be built; {', '.join(map(repr, values))} can")


def said(config: Mapping[str, Any], name: str) -> Any:
    """A field of config.json that must be there. Raises: UserError where it is not: a default could be wrong."""
    if name not in config:
        raise UserError(f"config.json: {name} is missing")
    return config[name]


def activation(config: Mapping[str, Any], name: str) -> str:
    """Our name of an activation. Raises: UserError for one that we have not."""
    theirs = said(config, name)
    if theirs not in _ACTIVATIONS:
        raise UserError(f"config.json: {name}={theirs!r} cannot be built; {', '.join(map(repr, _ACTIVATIONS))} can")
    return _ACTIVATIONS[theirs]


def activation_name(ours: str) -> str:
    """Their name of one of our activations."""
    return next((theirs for theirs, own in _ACTIVATIONS.items() if own == ours), ours)


def untie(tensors: Tensors, name: str, tied: str) -> None:
    """Removes the second of two tensors that are the same. Raises: UserError where they differ."""
    if tied in tensors and name in tensors:
        if not np.array_equal(tensors[tied], tensors[name]):
            raise UserError(f"the checkpoint has {tied} of its own, not that of {name}; only tied ones can be read")
        del tensors[tied]
