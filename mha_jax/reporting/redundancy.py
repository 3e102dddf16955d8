"""Redundancy of heads as a record for JSON, as lines to print, as rows, and as matrices with dendrograms."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from scipy.cluster import hierarchy

from mha_jax.heads.capture import layer_of
from mha_jax.heads.matching import Matched
from mha_jax.heads.redundancy import Effect, Measured, clusters, dendrogram
from mha_jax.heads.similarity import MEASURES, Pairs
from mha_jax.reporting.canvas import MUTED, OURS, PAGE, STYLE, panels, save

Found = Mapping[str, Mapping[str, Pairs]]
_ALIKE = LinearSegmentedColormap.from_list("alike", ["#12365f", OURS, PAGE])
# More heads than this have no names along the matrix.
_NAMED = 32


def record(
    found: Found,
    cuts: Mapping[str, float],
    measured: Measured,
    matched: Iterable[Matched],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """What redundancy.json holds.

    facts        of the run: "run", "seed", "step", "split", "other", "batches", "held_out", "found_by", and
                 "within_layers": {SEED: {ATTENTION: mean similarity of its pairs of heads, by "found_by"}}
    measures     {measure: {"meaning", "cut"}}; a cut is the distance up to which heads count as alike
    kinds        {kind: {"heads": ["encoder/0/attention:1", ...], "measures": {measure: {"value": [N][N],
                 "standard_error": [N][N] or null, "clusters": [[head, ...], ...]}}}}: clusters of two heads and more
    suggestions  [{"head", "twin", "distance", "redundant", "share", "scale", "pruned", "merged", "action"}]
    together, random   as `Measured` says: {"mean", "standard_error"} in nats a target, or null
    matchings    [{"between": [side, side], "kind", "measure", "matching": {"pairs": [[head, head], ...], "matched",
                 "chance", "shuffled", "p_value"}}], of layers (by attention), then of seeds and runs
    """
    return {
        **facts,
        "measures": {measure: {"meaning": MEASURES[measure], "cut": cut} for measure, cut in cuts.items()},
        "kinds": {
            kind: {
                "heads": [str(head) for head in next(iter(by_measure.values())).rows],
                "measures": {measure: _matrix(pairs, cuts[measure]) for measure, pairs in by_measure.items()},
            }
            for kind, by_measure in found.items()
        },
        "suggestions": [
            {
                **one.twins._asdict(),
                "head": str(one.twins.head),
                "twin": str(one.twins.twin),
                "pruned": _effect(one.pruned),
                "merged": _effect(one.merged),
                "action": one.action,
            }
            for one in measured.suggestions
        ],
        "together": _effect(measured.together),
        "random": _effect(measured.random),
        "matchings": [_matching(one) for one in matched],
    }


def _matching(one: Matched) -> dict[str, Any]:
    pairs = [[str(head), str(other)] for head, other in one.matching.pairs]
    return {**one._asdict(), "between": list(one.between), "matching": {**one.matching._asdict(), "pairs": pairs}}


def _matrix(pairs: Pairs, cut: float) -> dict[str, Any]:
    error = pairs.standard_error
    return {
        "value": pairs.value.round(6).tolist(),
        "standard_error": None if error is None else error.round(6).tolist(),
        "clusters": [[str(head) for head in group] for group in clusters(pairs, cut) if len(group) > 1],
    }


def _effect(effect: Effect | None) -> dict[str, float] | None:
    return None if effect is None else effect._asdict()


def within_layers(found: Found, measure: str) -> dict[str, float]:
    """{attention: mean similarity of its pairs of heads}; an attention of one head has none."""
    means = {}
    for by_measure in found.values():
        pairs = by_measure[measure]
        names = np.array([head.name for head in pairs.rows])
        for name in dict.fromkeys(names.tolist()):
            own = pairs.value[np.ix_(names == name, names == name)]
            if len(own) > 1:
                means[name] = round(float(own[np.triu_indices(len(own), 1)].mean()), 6)
    return means


def rows(found: Found) -> Iterator[list[Any]]:
    """The lines of redundancy.csv, the header first: one a kind, measure and pair of heads."""
    yield ["kind", "measure", "head", "other", "value", "standard_error"]
    for kind, by_measure in found.items():
        for measure, pairs in by_measure.items():
            for i, j in zip(*np.triu_indices(len(pairs.rows), 1), strict=True):
                error = "" if pairs.standard_error is None else f"{pairs.standard_error[i, j]:.6g}"
                yield [kind, measure, pairs.rows[i], pairs.columns[j], f"{pairs.value[i, j]:.6g}", error]


def lines(told: Mapping[str, Any]) -> Iterator[str]:
    """What the terminal shows of a record."""
    for kind, one in told["kinds"].items():
        for measure, matrix in one["measures"].items():
            cut = told["measures"][measure]["cut"]
            groups = ["{" + ", ".join(group) + "}" for group in matrix["clusters"]]
            within = "; ".join(groups) if groups else "none"
            yield f"{kind}, {measure}: clusters within distance {cut:g} of {len(one['heads'])} heads: {within}"
    where = "held-out batches" if told["held_out"] else "the same batches, as there are too few to hold any out"
    yield f"most alike by {told['found_by']}, and the loss (nats a target) without the head, over {where}:"
    for one in told["suggestions"]:
        mark = "suggested" if one["redundant"] else "beyond the cut"
        merged = f", merged {signed(one['merged'])}" if one["merged"] else ""
        yield (
            f"  {one['action']:5} {one['head']} (like {one['twin']}, distance {one['distance']:.3f}, {mark}): "
            f"pruned {signed(one['pruned'])}{merged}"
        )
    if told["together"]:
        together, random = signed(told["together"]), signed(told["random"])
        yield f"  all suggested heads pruned at once {together}; as many at random {random}"
    for one in told["matchings"]:
        if "/" not in one["between"][0]:  # of models; those of layers are in the JSON
            yield "{kind}, {measure}: heads of {between[0]} matched with {between[1]}: similarity ".format(**one) + (
                "{matched:.3f}, chance {chance:.3f}, best of shuffled {shuffled:.3f} (p = {p_value:.3f})"
            ).format(**one["matching"])


def signed(effect: Mapping[str, float]) -> str:
    """A difference with its standard error: "+0.0123 ± 0.0011"."""
    return f"{effect['mean']:+.4f} ± {effect['standard_error']:.4f}"


def draw(found: Found, cuts: Mapping[str, float], foot: str, directory: epath.Path) -> None:
    """Writes redundancy.svg and .png: a row a kind, a column a measure, heads in the order of the dendrogram."""
    kinds, measures = list(found), list(next(iter(found.values())))
    side = 8.6 / max(len(measures), 2)
    with mpl.rc_context({**STYLE, "axes.grid": False, "axes.titlesize": 9}):
        height = len(kinds) * (side + 1.35) + 0.4
        figure, axes = panels(2 * len(kinds), len(measures), height, height_ratios=[1.0, side] * len(kinds))
        image = None
        for i, kind in enumerate(kinds):
            for j, measure in enumerate(measures):
                pairs, above, below = found[kind][measure], axes[2 * i, j], axes[2 * i + 1, j]
                above.set_title(f"{kind}: {measure}")
                order = _draw_tree(above, dendrogram(pairs), cuts[measure], len(pairs.rows))
                shown = pairs.distance[np.ix_(order, order)]
                image = below.imshow(shown, cmap=_ALIKE, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
                _name(below, [f"{layer_of(pairs.rows[k].name)}.{pairs.rows[k].number}" for k in order], side)
        assert image is not None
        bar = figure.colorbar(image, ax=axes, shrink=0.5, aspect=40, pad=0.01)
        bar.set_label("distance (0 the same, 1 nothing in common)", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        save(figure, "redundancy", foot, directory)


def _draw_tree(axes: Axes, tree: np.ndarray, cut: float, heads: int) -> list[int]:
    """The dendrogram, merges within the cut in blue. Returns the heads in its order."""
    axes.set_xlim(-0.5, heads - 0.5)
    axes.set_xticks([])
    axes.set_yticks([0, 1])
    axes.set_ylim(0, 1.02)
    axes.tick_params(labelsize=6)
    axes.axhline(cut, color=MUTED, linewidth=0.6, linestyle=":")
    if not len(tree):
        return list(range(heads))
    drawn = hierarchy.dendrogram(tree, no_plot=True)
    for xs, ys in zip(drawn["icoord"], drawn["dcoord"], strict=True):
        # Scipy puts leaf n at 10 n + 5.
        axes.plot((np.asarray(xs) - 5) / 10, ys, color=OURS if max(ys) <= cut else MUTED, linewidth=0.9)
    return [int(leaf) for leaf in drawn["leaves"]]


def _name(axes: Axes, labels: list[str], side: float) -> None:
    """Heads by layer and number along both sides, where they can be read."""
    ticks = range(len(labels)) if len(labels) <= _NAMED else ()
    size = min(7.0, 72 * side / max(len(labels), 1) * 0.6)
    axes.set_xticks(ticks, labels if ticks else [], rotation=90, fontsize=size)
    axes.set_yticks(ticks, labels if ticks else [], fontsize=size)
    axes.tick_params(length=0)
