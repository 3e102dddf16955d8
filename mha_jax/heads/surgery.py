"""Another choice of heads for a trained model: which heads its layers have, and its state with others in their place.

An attention goes by the name that `heads.capture` gives it, "decoder/3/cross_attention". In every tree that mirrors the
model (params, constants, Adam's moments) it is the subtree STACK/blocks/LAYER/PLACE, a part: {"query": {"kernel", ...},
"key", "value", "out"}, or {"gate"}. Arrays may lead with the seed axis R or be of one seed: heads are counted from the
last axis. The work is done on the host, in NumPy, since there is a shape a layer.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mha_jax import config as configs
from mha_jax.heads.capture import kind_of, layer_of
from mha_jax.models.cost import matched_d_ff
from mha_jax.specs import ATTENTION_KINDS, HeadShape, RunSpec, UserError

Part = dict[str, Any]
Shapes = dict[str, HeadShape]
# Which axis of a leaf counts heads, from its end, and whether it counts query heads or key/value heads.
_HEADS, _GROUPS = "heads", "groups"
_AXES: dict[tuple[str, ...], tuple[int, str]] = {
    ("query", "kernel"): (-2, _HEADS),
    ("query", "bias"): (-2, _HEADS),
    ("key", "kernel"): (-2, _GROUPS),
    ("key", "bias"): (-2, _GROUPS),
    ("value", "kernel"): (-2, _GROUPS),
    ("value", "bias"): (-2, _GROUPS),
    ("out", "kernel"): (-3, _HEADS),
    ("gate",): (-1, _HEADS),
    ("learned_gate", "scale"): (-1, _HEADS),
    ("learned_gate", "log_alpha"): (-1, _HEADS),
    ("span", "fraction"): (-1, _HEADS),
}
_WITHOUT_HEADS = (("out", "bias"),)


class Selection(NamedTuple):
    """The heads of a layer by their numbers in the old layer, its groups likewise, and the new group of each head."""

    heads: tuple[int, ...]
    groups: tuple[int, ...]
    head_to_group: tuple[int, ...]

    def shape(self, old: HeadShape) -> HeadShape:
        """The layer's shape; a map that neighbouring heads follow anyway is left out."""
        return regrouped(dataclasses.replace(old, num_heads=len(self.heads)), len(self.groups), self.head_to_group)


def regrouped(old: HeadShape, num_kv_heads: int, head_to_group: tuple[int, ...]) -> HeadShape:
    """The shape with other groups; a map that neighbouring heads follow anyway is left out."""
    shape = dataclasses.replace(old, num_kv_heads=num_kv_heads, head_to_group=None)
    even = num_kv_heads and shape.num_heads % num_kv_heads == 0
    if not shape.num_heads or (even and shape.groups == head_to_group):
        return shape
    return dataclasses.replace(shape, head_to_group=head_to_group)


def head_shapes(run: RunSpec) -> Shapes:
    """The heads of every attention of a run's model by its name, in the order of the forward pass."""
    places = {kind: f"{kind}/{{}}/attention" for kind in ("encoder", "decoder")}
    places["cross"] = "decoder/{}/cross_attention"
    shapes = {
        places[kind].format(layer): shape
        for kind in ATTENTION_KINDS[run.task]
        for layer, shape in enumerate(run.model.heads(kind))
    }
    # A decoder's layer attends to itself, then to the memory: as its kinds stand, since the order is stable.
    return dict(sorted(shapes.items(), key=lambda item: (not item[0].startswith("encoder"), layer_of(item[0]))))


def check_heads(shapes: Shapes, name: str, heads: Sequence[int], what: str = "head") -> None:
    """Raises: UserError for an attention, head or group ("group") that does not exist, or that is named twice."""
    if name not in shapes:
        raise UserError(f"there is no attention {name!r}; there are {', '.join(shapes)}")
    count = shapes[name].num_heads if what == "head" else shapes[name].num_kv_heads
    for head in heads:
        if not 0 <= head < count:
            there = f"there are {count}, 0 to {count - 1}" if count else "there are none"
            raise UserError(f"{name} has no {what} {head}; {there}")
    if len(set(heads)) != len(heads):
        raise UserError(f"{name} names a {what} twice: {', '.join(map(str, heads))}")


def select(shapes: Shapes, name: str, heads: Sequence[int], groups: Sequence[int] | None = None) -> Selection:
    """Keeps heads of a layer in their old order, with the groups that they read, or with those that are given.

    Raises: UserError for a head or group that does not exist, and where a kept head reads a group that is not kept.
    """
    check_heads(shapes, name, heads)
    reads = {head: shapes[name].groups[head] for head in sorted(heads)}
    kept = sorted(set(reads.values())) if groups is None else sorted(groups)
    check_heads(shapes, name, kept, "group")
    for head, group in reads.items():
        if group not in kept:
            raise UserError(f"{name}: group {group} cannot go while head {head}, which reads it, stays")
    # A group that no head reads would be computed for nothing.
    kept = [group for group in kept if group in reads.values()]
    return Selection(tuple(reads), tuple(kept), tuple(kept.index(group) for group in reads.values()))


def take(part: Part, selection: Selection) -> Part:
    """The chosen heads and groups of one attention, in params, constants or moments alike.

    Raises: UserError for an array that is none of query, key, value, out and gate.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        names = tuple(str(entry.key) for entry in path)
        if names in _WITHOUT_HEADS:
            return leaf
        if names not in _AXES:
            raise UserError(
                f"heads of this model cannot be removed or added: {'.'.join(names)} belongs to none of them"
            )
        axis, counted = _AXES[names]
        numbers = selection.heads if counted == _HEADS else selection.groups
        return np.take(np.asarray(leaf), np.asarray(numbers, int), axis=axis)

    return jax.tree_util.tree_map_with_path(one, part)


def edit(tree: Any, changes: Mapping[str, Callable[[Part], Part]]) -> Any:
    """The tree with the parts of the named attentions changed, and all else as it is."""

    def one(path: tuple[Any, ...], node: Any) -> Any:
        if not _is_part(node):
            return node
        stack, _, layer, place = (entry.key for entry in path[-4:])
        change = changes.get(f"{stack}/{layer}/{place}")
        return node if change is None else change(node)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=_is_part)


def _is_part(node: Any) -> bool:
    return isinstance(node, dict) and ("gate" in node or {"query", "key", "value", "out"} <= node.keys())


def with_shapes(config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """The config's model section with these heads, every layer written out.

    The feed-forward width stays what `model.match` had made it, and `model.init` becomes "independent", since such a
    model is not drawn: its state comes with it, and more heads than fit in one shared draw are no fault.
    """
    run = configs.resolve(config)
    fields: dict[str, dict[str, list[Any]]] = {
        field.name: {kind: [None] * run.model.num_layers for kind in ATTENTION_KINDS[run.task]}
        for field in dataclasses.fields(HeadShape)
    }
    for name, shape in shapes.items():
        for field, value in dataclasses.asdict(shape).items():
            fields[field][kind_of(name)][layer_of(name)] = configs.plain(value)
    section = {**config["model"], **fields, "d_ff": matched_d_ff(run)}
    return {**section, "match": "none", "match_base": None, "init": "independent"}


def keep_heads(
    config: Mapping[str, Any],
    state: Any,
    keep: Mapping[str, Sequence[int]],
    groups: Mapping[str, Sequence[int]] | None = None,
) -> tuple[dict[str, Any], Any]:
    """The model without all but some heads of the named attentions; others stay as they are.

    Removing a head changes the function as setting its gate to 0 does. Gates that are left keep their values: none is
    folded into `out`, so that they can still be looked into. What heads do not own (`out.bias`) stays.

    Args:    config: of the run. state: its params, constants and optimiser state, in any tree.
             keep: {name: heads that stay}. groups: {name: key/value groups that stay}; default: those that are read.
    Returns: the model section for the config, and the state.
    Raises:  UserError for an attention, head or group that does not exist, and for a group that a kept head reads.
    """
    shapes, given = head_shapes(configs.resolve(config)), groups or {}
    keep = {**{name: range(shapes[name].num_heads) for name in given if name in shapes}, **keep}
    chosen = {name: select(shapes, name, heads, given.get(name)) for name, heads in keep.items()}
    for name in given:
        check_heads(shapes, name, ())
    changes = {name: lambda part, kept=kept: take(part, kept) for name, kept in chosen.items()}
    kept_shapes = shapes | {name: kept.shape(shapes[name]) for name, kept in chosen.items()}
    return with_shapes(config, kept_shapes), edit(state, changes)
