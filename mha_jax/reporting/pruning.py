"""The figure of pruning curves: metric against heads removed, by order, for each kind of attention."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from etils import epath
from matplotlib.axes import Axes

from mha_jax.reporting.canvas import MUTED, OURS, PAPER, RAMP, STYLE, Picture, panels, save
from mha_jax.reporting.statistics import interval

TITLES = {
    "all": "all attentions",
    "encoder": "encoder self-attention",
    "decoder": "decoder self-attention",
    "cross": "cross-attention",
}
_LABELS = {"loss": "loss (nats a target)", "accuracy": "accuracy", "bleu": "BLEU"}


def draw_curves(rows: Sequence[dict[str, Any]], foot: str, directory: epath.Path) -> Picture:
    """Writes curve.svg and curve.png: a row of panels a metric, a column a kind of attention.

    Args: rows: "kind", "order", "seed", "draw", "removed" (a share) and the metrics, as the verb `curve` writes them.
          Draws of one seed are averaged; lines are means over seeds, bands their 95 % t intervals.
    """
    kinds: list[str] = list(dict.fromkeys(row["kind"] for row in rows))
    orders: list[str] = list(dict.fromkeys(row["order"] for row in rows))
    metrics = [name for name in _LABELS if name in rows[0]]
    with mpl.rc_context(STYLE):
        figure, axes = panels(len(metrics), len(kinds), 2.7 * len(metrics) + 0.8)
        for i, metric in enumerate(metrics):
            for j, kind in enumerate(kinds):
                axis: Axes = axes[i, j]
                for order, colour in zip(orders, _colours(orders), strict=True):
                    found = [row for row in rows if (row["kind"], row["order"]) == (kind, order) and metric in row]
                    _line(axis, found, metric, order, colour)
                if i == 0:
                    axis.set_title(TITLES[kind], fontsize=9.5)
                if j == 0:
                    axis.set_ylabel(_LABELS[metric])
                if i == len(metrics) - 1:
                    axis.set_xlabel("heads removed, %")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(orders), fontsize=9)
        svg = save(figure, "curve", foot, directory)
    text = "Heads go in each order until none is left. Mean over seeds; the band is the 95 % t interval."
    return Picture("curve", "Pruning after training", text, svg)


def _line(axis: Axes, rows: Sequence[dict[str, Any]], metric: str, order: str, colour: Any) -> None:
    places = sorted({row["removed"] for row in rows})
    estimates = [interval(_by_seed([row for row in rows if row["removed"] == place], metric)) for place in places]
    drawn = [(100 * place, e) for place, e in zip(places, estimates, strict=True) if e is not None]
    x, means = [place for place, _ in drawn], [e.mean for _, e in drawn]
    axis.plot(x, means, color=colour, marker="o", markersize=3, linewidth=1.4, label=order)
    banded = [(place, e.low, e.high) for place, e in drawn if e.low is not None and e.high is not None]
    if banded:
        at, low, high = (list(column) for column in zip(*banded, strict=True))
        axis.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)


def _by_seed(rows: Sequence[dict[str, Any]], metric: str) -> list[float]:
    """One value a seed, the mean of its draws."""
    seeds = sorted({row["seed"] for row in rows})
    return [float(np.mean([row[metric] for row in rows if row["seed"] == seed])) for seed in seeds]


def _colours(orders: Sequence[str]) -> list[Any]:
    """The measure is ours, its reverse orange, random grey; further measures along the ramp."""
    measures = [order for order in orders if order != "random" and not order.startswith("reversed-")]
    ramp = {measure: RAMP((i + 0.5) / len(measures)) for i, measure in enumerate(measures)}
    if len(measures) == 1:
        ramp = {measures[0]: OURS}
    return [ramp.get(order, MUTED if order == "random" else PAPER) for order in orders]
