"""Which heads could go: clusters of heads that are alike, twins, and what the loss says when one of them is gone."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from mha_jax.heads.capture import Attended, Batch, attentions, real_queries, watch
from mha_jax.heads.similarity import Head, Pairs, jackknife
from mha_jax.models.losses import example_sums
from mha_jax.models.transformer import Model

# Distances up to which heads count as alike, by measure.
CUTS = {"js": 0.2, "cka": 0.2, "angles": 0.3, "weights": 0.5}
# Random sets of heads that are pruned for comparison with all suggestions together.
_CONTROLS = 5

Gates = dict[str, np.ndarray]


class Effect(NamedTuple):
    """A difference of loss, nats a target, over held-out batches, and its standard error over these."""

    mean: float
    standard_error: float


class Twins(NamedTuple):
    """Two heads that are alike, `head` the one that writes less, and so the one to go.

    distance   of the measure that found them; `redundant` where it is within the cut
    share      how much of what `head` writes is a multiple of what `twin` writes: squared cosine, uncentred
    scale      of the least squares fit: head = scale * twin; None for heads of two layers
    """

    head: Head
    twin: Head
    distance: float
    redundant: bool
    share: float | None
    scale: float | None


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """Twins, and the loss when the head's gate is 0; merged, the twin's gate is also 1 + scale times what it was."""

    twins: Twins
    pruned: Effect
    merged: Effect | None

    @property
    def action(self) -> str:
        """The cheaper of "merge" and "prune"."""
        return "merge" if self.merged is not None and self.merged.mean < self.pruned.mean else "prune"


class Measured(NamedTuple):
    """Every suggestion with its effect; all redundant heads pruned at once; and as many at random.

    `random` is the mean over five sets of as many heads in each attention, its standard error that over the sets.
    Both are None where no head is redundant.
    """

    suggestions: list[Suggestion]
    together: Effect | None
    random: Effect | None


def dendrogram(pairs: Pairs) -> np.ndarray:
    """The tree of average linkage (UPGMA; Sokal & Michener 1958) over the heads of one model, in scipy's form.

    [N - 1, 4]; empty for a single head.
    """
    if len(pairs.rows) < 2:
        return np.zeros((0, 4))
    return hierarchy.linkage(
        squareform(np.clip(pairs.distance, 0, None), checks=False), "average", optimal_ordering=True
    )


def clusters(pairs: Pairs, cut: float) -> list[tuple[Head, ...]]:
    """Heads whose mean distance within the tree is at most `cut`, the largest cluster first; every head is in one."""
    tree = dendrogram(pairs)
    labels = hierarchy.fcluster(tree, cut, "distance") if len(tree) else np.ones(len(pairs.rows), int)
    groups: dict[int, list[Head]] = {}
    for head, label in zip(pairs.rows, labels, strict=True):
        groups.setdefault(int(label), []).append(head)
    return sorted(map(tuple, groups.values()), key=len, reverse=True)


def find_twins(pairs: Pairs, grams: Mapping[str, np.ndarray], cut: float, limit: int = 12) -> list[Twins]:
    """Up to `limit` twins, the most alike first. A head goes once, and a twin that stays does not go itself.

    Args: grams: {attention: [H, H]} of `written_grams`: who writes less, and the least squares fit.
    """
    size = {Head(name, h): gram[h, h] for name, gram in grams.items() for h in range(len(gram))}
    rows, columns = np.triu_indices(len(pairs.rows), 1)
    gone: set[Head] = set()
    kept: set[Head] = set()
    found: list[Twins] = []
    for place in np.argsort(pairs.distance[rows, columns], kind="stable"):
        i, j = rows[place], columns[place]
        head, twin = sorted((pairs.rows[i], pairs.rows[j]), key=lambda one: (one in kept, size[one]))
        if len(found) == limit:
            break
        if {head, twin} & gone or head in kept:
            continue
        gone.add(head)
        kept.add(twin)
        distance = float(pairs.distance[i, j])
        found.append(Twins(head, twin, distance, distance <= cut, *_fit(grams, head, twin)))
    return found


def _fit(grams: Mapping[str, np.ndarray], head: Head, twin: Head) -> tuple[float | None, float | None]:
    if head.name != twin.name:
        return None, None
    gram = grams[head.name]
    between, own, twins = (
        float(gram[a, b])
        for a, b in ((head.number, twin.number), (head.number, head.number), (twin.number, twin.number))
    )
    if not own or not twins:
        return 0.0, 0.0
    return between**2 / (own * twins), between / twins


def written_grams(model: Model, batches: Sequence[Batch]) -> dict[str, np.ndarray]:
    """{attention: [H, H]}: sums over real queries of <what one head writes, what another of its layer writes>."""
    sums = jax.jit(_gram_sums)
    total = functools.reduce(functools.partial(jax.tree.map, jnp.add), (sums(model, batch) for batch in batches))
    return {name: np.asarray(total[name], np.float64) for name in attentions(model)}


def _gram_sums(model: Model, batch: Batch) -> dict[str, Float[Array, "H H"]]:
    real = real_queries(model, batch)

    def look(name: str, attended: Attended) -> Array:
        layer, q_BTHK, k_BSGK, v_BSGV, visibility, _ = attended
        o_BTHV = layer.attended(q_BTHK, k_BSGK, v_BSGV, visibility)
        o_BTHV = jnp.where(real[name.split("/")[0]][:, :, None, None], o_BTHV, 0).astype(jnp.float32)
        kernel_HVD = (layer.head_gate()[:, None, None] * layer.out.kernel[...]).astype(jnp.float32)
        # Products first over positions, then over the stream: nothing D wide is held for every position and head.
        outer_HVIU = jnp.einsum("BTHV,BTIU->HVIU", o_BTHV, o_BTHV)
        return jnp.einsum("HVIU,HVD,IUD->HI", outer_HVIU, kernel_HVD, kernel_HVD)

    return watch(model, batch, look)[1]


def measure_effects(
    task: str, model: Model, batches: Sequence[Batch], twins: Sequence[Twins], seed: int = 0
) -> Measured:
    """The loss of every suggestion less that of the whole model, over batches that should be others than found them."""
    gates = {name: np.asarray(layer.gate[...], np.float32) for name, layer in attentions(model).items()}
    redundant = [one.head for one in twins if one.redundant]
    plans = [_with(gates, {one.head: 0.0}) for one in twins]
    plans += [
        _with(gates, {one.head: 0.0, one.twin: (1 + one.scale) * gates[one.twin.name][one.twin.number]})
        for one in twins
        if one.scale is not None
    ]
    if redundant:
        plans += [_with(gates, dict.fromkeys(redundant, 0.0))]
        plans += [_with(gates, dict.fromkeys(heads, 0.0)) for heads in _controls(gates, redundant, seed)]
    effects = iter(_effects(task, model, batches, [gates, *plans]))
    pruned = [next(effects) for _ in twins]
    merged = [None if one.scale is None else next(effects) for one in twins]
    found = [Suggestion(*parts) for parts in zip(twins, pruned, merged, strict=True)]
    if not redundant:
        return Measured(found, None, None)
    together, controls = next(effects), [effect.mean for effect in effects]
    spread = float(np.std(controls, ddof=1) / np.sqrt(len(controls)))
    return Measured(found, together, Effect(float(np.mean(controls)), spread))


def _with(gates: Gates, changes: Mapping[Head, float]) -> Gates:
    changed = {name: gates_H.copy() for name, gates_H in gates.items()}
    for head, gate in changes.items():
        changed[head.name][head.number] = gate
    return changed


def _controls(gates: Gates, redundant: Sequence[Head], seed: int) -> list[list[Head]]:
    """Random sets of heads, as many in each attention as the redundant ones have there."""
    rng = np.random.default_rng(seed)
    counts = {name: sum(head.name == name for head in redundant) for name in gates}
    return [
        [Head(name, int(h)) for name, n in counts.items() for h in rng.permutation(len(gates[name]))[:n]]
        for _ in range(_CONTROLS)
    ]


def _effects(task: str, model: Model, batches: Sequence[Batch], plans: Sequence[Gates]) -> list[Effect]:
    """The loss under every plan of gates but the first, less that under the first."""
    stacked = {name: jnp.stack([plan[name] for plan in plans]) for name in plans[0]}

    @jax.jit
    def losses(model: Model, stacked: Any, batch: Batch) -> tuple[Array, Array]:
        def one(gates: dict[str, Array]) -> tuple[Array, Array]:
            gated = nnx.clone(model)
            for name, layer in attentions(gated).items():
                layer.gate[...] = gates[name].astype(layer.gate[...].dtype)
            sums = example_sums(task, gated, batch)
            return sums["loss"].sum(), sums["weight"].sum()

        loss_P, weight_P = jax.lax.map(one, stacked)
        # Differences of one batch are small against its loss: they are taken before batches are added up.
        return loss_P[1:] - loss_P[0], weight_P[0]

    parts = [losses(model, stacked, batch) for batch in batches]
    mean, error = jackknife(parts.__getitem__, len(parts), lambda sums: sums[0] / jnp.maximum(sums[1], 1))
    return [Effect(float(m), float(e)) for m, e in zip(mean, error, strict=True)]
