"""Figures of a sweep that prunes heads while it trains: heads alive against step, and quality against heads alive."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mha_jax.config import resolve
from mha_jax.reporting.canvas import INK, OURS, PAGE, PAPER, RAMP, panels
from mha_jax.reporting.pruning import TITLES
from mha_jax.reporting.results import Cell, Results
from mha_jax.reporting.statistics import Estimate, interval
from mha_jax.reporting.tables import Row, Table, deciding, with_unit

_ALIVE = "validation/heads_alive"


def alive(results: Results, table: Table) -> Figure | None:
    """Heads whose gate is not 0 against training step, a column a kind of attention; None where no cell has gates."""
    rows = [row for row in table.rows if _ALIVE in row.cell.curves]
    if not rows:
        return None
    names = [name for name in results.metrics if name == _ALIVE or name.startswith(f"{_ALIVE}/")]
    figure, axes = panels(1, len(names), 3.6)
    for j, name in enumerate(names):
        axis: Axes = axes[0, j]
        for i, row in enumerate(rows):
            _curve(axis, row, name, RAMP((i + 0.5) / len(rows)))
        axis.set_title(TITLES["all" if name == _ALIVE else name.rsplit("/", 1)[-1]], fontsize=9.5)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("heads alive")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=min(len(rows), 4), fontsize=8.5)
    return figure


def kept(results: Results, table: Table) -> Figure | None:
    """The deciding metrics against heads alive at the end: pruned while training, and cells without gates beside."""
    points = [(row, count) for row in table.rows if (count := _count(row.cell)) is not None]
    if not any(_ALIVE in row.cell.curves for row, _ in points):
        return None
    metrics = deciding(results)
    figure, axes = panels(1, len(metrics), 3.6)
    for j, metric in enumerate(metrics):
        axis: Axes = axes[0, j]
        drawn = [(row, count, row.estimates[metric]) for row, count in points if metric in row.estimates]
        for gated in (True, False):
            _points(axis, [point for point in drawn if (_ALIVE in point[0].cell.curves) == gated], gated)
        axis.set_xlabel("heads alive")
        axis.set_ylabel(with_unit(metric))
        axis.set_xlim(left=0)
    axes[0, 0].legend(fontsize=8.5)
    return figure


def _curve(axis: Axes, row: Row, name: str, colour: Any) -> None:
    seeds = list(row.cell.curves.get(name, {}).values())
    steps = sorted(set.intersection(*(set(points) for points in seeds))) if seeds else []
    if not steps:
        return
    values = np.array([[points[step] for step in steps] for points in seeds])
    axis.plot(steps, values.mean(axis=0), color=colour, marker="o", markersize=2.5, linewidth=1.4, label=row.label)
    axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)


def _count(cell: Cell) -> Estimate | None:
    """Heads alive at the end; of a cell without gates all its heads."""
    if _ALIVE in cell.curves:
        return interval(list(cell.values(_ALIVE).values()))
    if cell.config is None:
        return None
    return interval([float(resolve(cell.config).gated_heads)])


def _points(axis: Axes, points: list[tuple[Row, Estimate, Estimate]], gated: bool) -> None:
    colour, label = (OURS, "pruned while training") if gated else (PAPER, "trained without gates")
    for i, (row, x, y) in enumerate(sorted(points, key=lambda point: point[1].mean)):
        axis.errorbar(
            x.mean, y.mean, y.half_width, x.half_width, fmt="o" if gated else "D", color=colour, capsize=3,
            markersize=6, markerfacecolor=colour if gated else PAGE, label=label if i == 0 else None,
        )  # fmt: skip
        axis.annotate(row.label, (x.mean, y.mean), (6, 5), textcoords="offset points", fontsize=7.5, color=INK)
