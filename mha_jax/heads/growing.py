"""Other heads for a trained model that may not be fewer: split, merged, added, or over fewer keys and values.

split     exact: two copies of a head, one of which writes the first half of its value channels, the other the rest
add       exact: heads drawn anew whose rows of `out` are 0
merge     exact for two heads of one attention pattern that one head's width can write, as two halves of a split; else
          the closest head in least squares
to_groups approximate: keys and values of neighbouring groups pooled (Ainslie et al. 2023, section 2.1)

Each takes a run's config and its state, {"params", "constants", "optimizer", ...}, and returns the model section of the
new config and the new state, as `surgery.keep_heads` does. Moments of Adam are treated as each function says.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from mha_jax import config as configs
from mha_jax.heads.surgery import (
    Part,
    Selection,
    check_heads,
    edit,
    head_shapes,
    regrouped,
    take,
    with_shapes,
)
from mha_jax.specs import HeadShape, UserError
from mha_jax.specs.checks import divisors, listing

Made = tuple[dict[str, Any], Any]
Change = Callable[[Part], Part]
_KNOWN = {"query", "key", "value", "out", "gate"}


def split_heads(config: Mapping[str, Any], state: Any, heads: Mapping[str, Sequence[int]]) -> Made:
    """Each of these heads as two, side by side; the function is kept to rounding.

    Both copies attend as the head did. `out` of the first is 0 but for channels below V // 2, that of the second is 0
    there: unlike two equal copies with half of `out` each, they get different gradients and grow apart. A head whose
    keys and values are its own gets a second group; where others read them too, both copies read that group.
    Moments: copied with their weights, and 0 where `out` is.

    Raises: UserError for a head that does not exist, and where V = 1 leaves nothing to share out.
    """
    shapes, new, changes = head_shapes(configs.resolve(config)), {}, {}
    for name, numbers in heads.items():
        check_heads(shapes, name, numbers)
        old = shapes[name]
        if numbers and old.v_dim < 2:
            raise UserError(f"{name} has v_dim={old.v_dim}: a head needs at least 2 value channels to be split")
        selection = _doubled(old, set(numbers))
        new[name] = selection.shape(old)
        changes[name] = _splitter(selection, _halves(old, set(numbers)))
    return with_shapes(config, shapes | new), edit(state, changes)


def _doubled(old: HeadShape, split: set[int]) -> Selection:
    own = {g for h, g in enumerate(old.groups) if h in split and old.groups.count(g) == 1}
    groups = [g for g in range(old.num_kv_heads) for _ in range(2 if g in own else 1)]
    heads = [h for h in range(old.num_heads) for _ in range(2 if h in split else 1)]
    second = [i > 0 and heads[i - 1] == h for i, h in enumerate(heads)]
    reads = [
        groups.index(old.groups[h]) + (copy and old.groups[h] in own) for h, copy in zip(heads, second, strict=True)
    ]
    return Selection(tuple(heads), tuple(groups), tuple(map(int, reads)))


def _halves(old: HeadShape, split: set[int]) -> np.ndarray:
    """[H', V]: which channels each new head writes."""
    first = np.arange(old.v_dim) < old.v_dim // 2
    rows = [row for h in range(old.num_heads) for row in ([first, ~first] if h in split else [first | ~first])]
    return np.array(rows).reshape(-1, old.v_dim)


def _splitter(selection: Selection, writes_HV: np.ndarray) -> Change:
    def change(part: Part) -> Part:
        part = take(part, selection)
        if "out" in part:
            out = part["out"]
            part = {**part, "out": {**out, "kernel": np.where(writes_HV[:, :, None], out["kernel"], 0)}}
        return part

    return change


def add_heads(config: Mapping[str, Any], state: Any, counts: Mapping[str, int], seed: int) -> Made:
    """So many more heads after those of each attention, which change nothing until they are trained.

    Queries, keys and values are drawn as at initialisation (Glorot-uniform, "independent"), from `seed`; rows of `out`
    are 0, so their gradient is not. Where each head has keys and values of its own, the new ones have too; else they
    read the groups that the fewest heads read. Moments: 0.

    Raises: UserError for an attention that does not exist, and for a model with learned gates or spans.
    """
    shapes, new = head_shapes(configs.resolve(config)), {}
    weights: dict[str, Change] = {}
    moments: dict[str, Change] = {}
    for place, (name, count) in enumerate(counts.items()):
        check_heads(shapes, name, ())
        if count < 1:
            raise UserError(f"{name}: {count} heads cannot be added; at least 1 can")
        new[name] = _extended(shapes[name], count)
        weights[name] = _adder(shapes[name], new[name], np.random.default_rng((seed, place)))
        moments[name] = _adder(shapes[name], new[name], None)
    return with_shapes(config, shapes | new), operate(state, weights, moments)


def _extended(old: HeadShape, count: int) -> HeadShape:
    grown = dataclasses.replace(old, num_heads=old.num_heads + count)
    if old.groups == tuple(range(old.num_kv_heads)):
        return regrouped(grown, old.num_kv_heads + count, tuple(range(grown.num_heads)))
    reads = list(old.groups)
    for _ in range(count):
        reads.append(min(range(old.num_kv_heads), key=reads.count))
    return regrouped(grown, old.num_kv_heads, tuple(reads))


def _adder(old: HeadShape, new: HeadShape, rng: np.random.Generator | None) -> Change:
    def kernel(leaf: np.ndarray, count: int) -> np.ndarray:
        """Fresh columns [..., D, count, width] for the kernel, or zeros for its moments."""
        shape = (*leaf.shape[:-2], count, leaf.shape[-1])
        columns = (leaf.shape[-2] + count) * leaf.shape[-1]
        limit = 0.0 if rng is None else (6 / (leaf.shape[-3] + columns)) ** 0.5
        fresh = np.zeros(shape) if rng is None else rng.uniform(-limit, limit, shape)
        return np.concatenate([leaf, fresh.astype(leaf.dtype)], axis=-2)

    def zeros(leaf: np.ndarray, count: int, axis: int, value: float = 0.0) -> np.ndarray:
        shape = list(leaf.shape)
        shape[axis] = count
        return np.concatenate([leaf, np.full(shape, value, leaf.dtype)], axis=axis)

    def change(part: Part) -> Part:
        check_known(part)
        heads, groups = new.num_heads - old.num_heads, new.num_kv_heads - old.num_kv_heads
        if "gate" in part:
            return {**part, "gate": zeros(np.asarray(part["gate"]), heads, -1, 1.0)}
        grown = dict(part)
        for role, count in (("query", heads), ("key", groups), ("value", groups)):
            grown[role] = {
                kind: kernel(np.asarray(leaf), count) if kind == "kernel" else zeros(np.asarray(leaf), count, -2)
                for kind, leaf in part[role].items()
            }
        grown["out"] = {**part["out"], "kernel": zeros(np.asarray(part["out"]["kernel"]), heads, -3)}
        return grown

    return change


def to_groups(
    config: Mapping[str, Any],
    state: Any,
    num_kv_heads: int,
    names: Sequence[str],
    pool: Literal["mean", "first"] = "mean",
) -> Made:
    """Grouped-query attention out of more keys and values: neighbouring groups become one, G in the named attentions.

    "mean" pools keys and values, "first" keeps those of the first; the paper's figure 4 finds the mean better.
    Moments of keys and values: the sum over a group, as the new gradient is the sum of the old ones, and its square is
    on average the sum of squares where those are independent. Attentions without heads stay as they are.

    Raises: UserError where G does not divide the groups that there are, or these are not neighbours'.
    """
    shapes, new = head_shapes(configs.resolve(config)), {}
    weights: dict[str, Change] = {}
    moments: dict[str, Change] = {}
    if pool not in ("mean", "first"):
        raise UserError(f"pool={pool!r} is not one of 'mean', 'first'")
    for name in names:
        check_heads(shapes, name, ())
        old = shapes[name]
        if not old.num_heads:
            continue
        if old.head_to_group is not None or num_kv_heads < 1 or old.num_kv_heads % num_kv_heads:
            fits = "none, as its map is uneven" if old.head_to_group else listing(divisors(old.num_kv_heads))
            raise UserError(
                f"{name} has {old.num_kv_heads} key/value heads; to_groups={num_kv_heads} must divide them: {fits}"
            )
        size = old.num_kv_heads // num_kv_heads
        new[name] = regrouped(old, num_kv_heads, tuple(g // size for g in old.groups))
        weights[name], moments[name] = _pooler(num_kv_heads, pool), _pooler(num_kv_heads, "sum")
    return with_shapes(config, shapes | new), operate(state, weights, moments)


def _pooler(num_kv_heads: int, how: str) -> Change:
    pooled = {"mean": lambda x: x.mean(axis=-2), "sum": lambda x: x.sum(axis=-2), "first": lambda x: x[..., 0, :]}[how]

    def pool(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        return pooled(leaf.reshape(*leaf.shape[:-2], num_kv_heads, -1, leaf.shape[-1]))

    def change(part: Part) -> Part:
        check_known(part)
        return part | {
            role: {k: pool(leaf) for k, leaf in part[role].items()} for role in ("key", "value") if role in part
        }

    return change


def operate(state: Any, weights: Mapping[str, Change], moments: Mapping[str, Change]) -> Any:
    """The state with weights and gates changed in one way, and the optimiser's moments in another."""
    changed = {name: edit(state[name], weights) for name in ("params", "constants")}
    return {**state, **changed, "optimizer": edit(state["optimizer"], moments)}


def check_known(part: Part) -> None:
    unknown = set(part) - _KNOWN
    if unknown:
        raise UserError(f"heads with a {sorted(unknown)[0]} cannot be added, merged or regrouped")
