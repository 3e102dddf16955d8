"""Two heads of a trained model as one: exactly where they do the same, else as close as one head's width allows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mha_jax import config as configs
from mha_jax.heads.growing import Change, Made, check_known, operate
from mha_jax.heads.surgery import Part, Selection, Shapes, check_heads, head_shapes, select, take, with_shapes
from mha_jax.specs import UserError

Pairs = Sequence[tuple[int, int]]


def merge_heads(config: Mapping[str, Any], state: Any, pairs: Mapping[str, Pairs]) -> Made:
    """Each pair of heads as one, in the place of the first; its gate is 1, as gates are folded into `out`.

    Scores of the merged head are the mean of both heads', its values what both wrote together:

      Q K^T = (Q_a K_a^T + Q_b K_b^T) / 2,    V O = g_a V_a O_a + g_b V_b O_b

    Biases are a row more of Q, K and V. Where both heads read one group, K and V stay and only Q and O change. Else
    the right sides are cut to rank K and V by their largest singular values, which no other head of that width comes
    closer to (Eckart and Young 1936). With rotary positions, queries and keys are averaged as they are: their channels
    turn in pairs, so that no other basis will do.
    The function is kept where both attend alike and V O fits into the width, as for the halves of a split head; else
    its change is up to the data. Moments: the mean of both heads'.

    Raises: UserError for a head that does not exist or is named twice, and where only one of two groups is free to go.
    """
    run = configs.resolve(config)
    shapes, new = head_shapes(run), {}
    weights: dict[str, Change] = {}
    moments: dict[str, Change] = {}
    for name, paired in pairs.items():
        check_heads(shapes, name, [head for pair in paired for head in pair])
        _check_groups(shapes, name, paired)
        gone = {second for _, second in paired}
        selection = select(shapes, name, [h for h in range(shapes[name].num_heads) if h not in gone])
        new[name] = selection.shape(shapes[name])
        merged = _merged(state, name, shapes[name].groups, paired, rotary=run.model.positions == "rope")
        weights[name] = _replacer(merged, selection)
        moments[name] = _averager(shapes[name].groups, paired, selection)
    return with_shapes(config, shapes | new), operate(state, weights, moments)


def _check_groups(shapes: Shapes, name: str, pairs: Pairs) -> None:
    groups = shapes[name].groups
    for pair in pairs:
        read = [groups[head] for head in pair]
        if read[0] != read[1] and any(groups.count(group) > 1 for group in read):
            raise UserError(
                f"{name}: heads {pair[0]} and {pair[1]} cannot be merged: they read groups {read[0]} and {read[1]}, "
                "which other heads read too"
            )


def _part(tree: Any, name: str) -> Part:
    stack, layer, place = name.split("/")
    return tree[stack]["blocks"][int(layer)][place]


def _merged(state: Any, name: str, groups: Sequence[int], pairs: Pairs, *, rotary: bool) -> dict[str, Part]:
    """The attention's params and constants with each pair's result in the place of its first head."""
    params, constants = _part(state["params"], name), _part(state["constants"], name)
    check_known(params)
    check_known(constants)
    params = {role: {kind: np.array(leaf) for kind, leaf in leaves.items()} for role, leaves in params.items()}
    gate = np.array(constants["gate"])
    for a, b in pairs:
        q, o = [_head(params["query"], h) for h in (a, b)], [params["out"]["kernel"][..., h, :, :] for h in (a, b)]
        o = [gate[..., h, None, None] * x for h, x in zip((a, b), o, strict=True)]
        if groups[a] == groups[b]:
            _put(params["query"], a, (q[0] + q[1]) / 2)
            params["out"]["kernel"][..., a, :, :] = o[0] + o[1]
        else:
            k, v = ([_head(params[role], groups[h]) for h in (a, b)] for role in ("key", "value"))
            query, key = ((q[0] + q[1]) / 2, (k[0] + k[1]) / 2) if rotary else _scores(q, k)
            value, out = _cut(v[0] @ o[0] + v[1] @ o[1], v[0].shape[-1])
            _put(params["query"], a, query)
            _put(params["key"], groups[a], key)
            _put(params["value"], groups[a], value)
            params["out"]["kernel"][..., a, :, :] = out
        gate[..., a] = 1
    return {"params": params, "constants": {**constants, "gate": gate}}


def _scores(q: Sequence[np.ndarray], k: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Queries and keys of the mean of both heads' scores."""
    one, other = (np.asarray(x, np.float64) @ np.swapaxes(y, -1, -2) for x, y in zip(q, k, strict=True))
    query, key_T = _cut((one + other) / 2, q[0].shape[-1])
    return query, np.swapaxes(key_T, -1, -2)


def _cut(product: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Two factors of that width whose product is closest; both get the root of each singular value.

    A product of lower rank than `width` has channels that are 0.
    """
    u, s, v = np.linalg.svd(np.asarray(product, np.float64), full_matrices=False)
    root = np.sqrt(s[..., :width])
    left, right_T = u[..., :width] * root[..., None, :], np.swapaxes(v[..., :width, :], -1, -2) * root[..., None, :]
    unused = [(0, 0)] * (left.ndim - 1) + [(0, width - left.shape[-1])]
    return np.pad(left, unused), np.swapaxes(np.pad(right_T, unused), -1, -2)


def _head(leaves: Part, number: int) -> np.ndarray:
    """Kernel [..., D, width] of one head, with its bias as one row more."""
    kernel = leaves["kernel"][..., number, :]
    return kernel if "bias" not in leaves else np.concatenate([kernel, leaves["bias"][..., number, None, :]], axis=-2)


def _put(leaves: Part, number: int, rows: np.ndarray) -> None:
    leaves["kernel"][..., number, :] = rows[..., : leaves["kernel"].shape[-3], :]
    if "bias" in leaves:
        leaves["bias"][..., number, :] = rows[..., -1, :]


def _replacer(merged: dict[str, Part], selection: Selection) -> Change:
    return lambda part: take(merged["constants" if "gate" in part else "params"], selection)


def _averager(groups: Sequence[int], pairs: Pairs, selection: Selection) -> Change:
    def change(part: Part) -> Part:
        check_known(part)
        mean = {role: {kind: np.array(leaf) for kind, leaf in leaves.items()} for role, leaves in part.items()}
        for a, b in pairs:
            read = (groups[a], groups[b])
            for role, (i, j) in {"query": (a, b), "key": read, "value": read}.items():
                _put(mean[role], i, (_head(mean[role], i) + _head(mean[role], j)) / 2)
            kernel = mean["out"]["kernel"]
            kernel[..., a, :, :] = (kernel[..., a, :, :] + kernel[..., b, :, :]) / 2
        return take(mean, selection)

    return change
