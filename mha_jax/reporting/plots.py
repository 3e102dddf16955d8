"""The report's figures: quality by head count, differences from the base, learning curves, quality against cost.

Ours is blue with its interval; the paper's numbers are hollow orange diamonds. Every figure carries its provenance.
"""

import math
from collections.abc import Callable

import matplotlib as mpl
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mha_jax.reporting.alive import alive, kept
from mha_jax.reporting.canvas import MUTED, OURS, PAGE, PAPER, RAMP, STYLE, Picture, panels, save
from mha_jax.reporting.provenance import footer
from mha_jax.reporting.results import Cell, Results
from mha_jax.reporting.statistics import interval
from mha_jax.reporting.tables import Row, Table, deciding, head_shape, headlines, with_unit
from mha_jax.training.metrics import lower_is_better

_AXES = {
    "h": "heads",
    "h_kv": "key/value heads",
    "d_k": "d_k (key size of a head)",
    "d_v": "d_v (value size of a head)",
}


def draw(results: Results, table: Table, directory: epath.Path) -> list[Picture]:
    """Writes every figure that the results allow as SVG and PNG, and returns them in the order of the page."""
    plans: list[tuple[str, str, Callable[[Results, Table], Figure | None], str]] = [
        ("quality", "Quality by head shape", quality,
         "Mean and 95 % interval over seeds; dots are single seeds."),
        ("differences", "Difference from the base", differences,
         "Paired by seed, with 95 % intervals; the dotted line is the base."),
        ("curves", "Learning curves", curves,
         "Mean over seeds; the band spans all seeds. Right: minus the base, seed by seed."),
        ("cost", "Quality against cost", cost,
         "Ringed in green: the Pareto front, of cells that no other is both better and cheaper than."),
        ("kept", "Quality against heads alive", kept,
         "Mean and 95 % interval over seeds, of both. A head is alive while its gate is not exactly 0."),
        ("alive", "Heads alive against training step", alive,
         "Mean over seeds; the band spans all seeds."),
    ]  # fmt: skip
    pictures = []
    with mpl.rc_context(STYLE):
        for name, title, plot, text in plans:
            figure = plot(results, table)
            if figure is not None:
                pictures.append(Picture(name, title, text, save(figure, name, footer(results), directory)))
    return pictures


def quality(results: Results, table: Table) -> Figure | None:
    """Metric by head count (log2), the paper's own numbers on a twin panel: its corpus, so its scale, is another."""
    shown = [m for m in headlines(results) if any(row.paper.get(m) is not None for row in table.rows)]
    twin = bool(shown)
    shown = shown or deciding(results)
    if not table.rows or not shown:
        return None
    figure, axes = panels(len(shown), 2 if twin else 1, 3.3 * len(shown) + 0.6)
    name, places = _places(table)
    for i, metric in enumerate(shown):
        _ours(axes[i, 0], table, metric, places)
        if twin:
            axes[i, 0].set_title("this sweep")
            _papers(axes[i, 1], table, metric, places)
            axes[i, 1].set_title("the paper")
        for axis in axes[i]:
            axis.set_ylabel(with_unit(metric))
            _x_axis(axis, name, table, places)
    return figure


def _places(table: Table) -> tuple[str | None, list[float]]:
    """Where each row stands on the x axis: at the first of h, h_kv, d_k, d_v that varies, or else one after another."""
    shapes = [head_shape(row.cell) for row in table.rows]
    for name in _AXES:
        values = [shape[name] for shape in shapes]
        if len(set(map(str, values))) > 1 and all(isinstance(v, int) and v > 0 for v in values):
            return name, [math.log2(v) for v in values]
    return None, [float(i) for i in range(len(shapes))]


def _x_axis(axis: Axes, name: str | None, table: Table, places: list[float]) -> None:
    ticks = sorted(set(places))
    labels = [f"{2**x:.0f}" for x in ticks] if name else [row.label for row in table.rows]
    axis.set_xticks(ticks, labels)
    axis.set_xlabel(_AXES[name] if name else "")
    axis.set_xlim(ticks[0] - 0.35, ticks[-1] + 0.35)
    axis.grid(axis="x", visible=False)


def _series(table: Table) -> list[list[int]]:
    """Rows that belong on one line: the same heads times width, or else the same width; largest first."""
    shapes = [head_shape(row.cell) for row in table.rows]

    def grouped(total: bool) -> list[list[int]]:
        groups: dict[str, list[int]] = {}
        for i, shape in enumerate(shapes):
            heads = shape["h"] if total and isinstance(shape["h"], int) else 1
            widths = [w * heads if isinstance(w, int) else w for w in (shape["d_k"], shape["d_v"])]
            kv = "all" if shape["h_kv"] == shape["h"] else shape["h_kv"]
            rest = {k: v for k, v in table.rows[i].text.items() if k.startswith(("model.", "data.", "optimizer."))}
            groups.setdefault(f"{widths} {kv} {rest}", []).append(i)
        return sorted(groups.values(), key=len, reverse=True)

    by_total, by_width = grouped(True), grouped(False)
    return by_total if len(by_total) <= len(by_width) else by_width


def _ours(axis: Axes, table: Table, metric: str, places: list[float]) -> None:
    groups = _series(table)
    for rank, group in enumerate(groups):
        members = sorted((i for i in group if metric in table.rows[i].estimates), key=lambda i: places[i])
        colour = OURS if rank == 0 else RAMP(0.95)
        rows = [table.rows[i] for i in members]
        x = [places[i] for i in members]
        estimates = [row.estimates[metric] for row in rows]
        axis.plot(x, [e.mean for e in estimates], color=colour, linewidth=1.5, alpha=0.7)
        for at, row, e in zip(x, rows, estimates, strict=True):
            axis.errorbar(
                at, e.mean, yerr=e.half_width, fmt="o", color=colour, markersize=7 if row.is_base else 5.5, capsize=4
            )
            seeds = list(row.cell.values(metric).values())
            axis.plot([at + 0.09] * len(seeds), seeds, ".", color=colour, alpha=0.45, markersize=4)
            if rank > 0 and len(group) == 1:
                axis.annotate(row.label, (at, e.mean), (9, 5), textcoords="offset points", fontsize=8.5, color=MUTED)


def _papers(axis: Axes, table: Table, metric: str, places: list[float]) -> None:
    for rank, group in enumerate(_series(table)):
        members = sorted((i for i in group if table.rows[i].paper.get(metric) is not None), key=lambda i: places[i])
        x, y = [places[i] for i in members], [table.rows[i].paper[metric] for i in members]
        axis.plot(x, y, color=PAPER, linewidth=1.2, linestyle=(0, (4, 3)), alpha=0.8)
        axis.plot(x, y, "D", color=PAPER, markerfacecolor=PAGE, markersize=6.5, markeredgewidth=1.6)
        if rank > 0 and len(members) == 1:
            label = table.rows[members[0]].label
            axis.annotate(label, (x[0], y[0]), (9, 5), textcoords="offset points", fontsize=8.5, color=MUTED)


def differences(results: Results, table: Table) -> Figure | None:
    """Every cell minus the base, with the paper's own difference beside it."""
    shown = [m for m in deciding(results) if any(m in row.differences for row in table.rows)]
    rows = [row for row in table.rows if row.differences]
    if not shown:
        return None
    figure, axes = panels(1, len(shown), 1.3 + 0.42 * len(rows))
    base = next(row for row in table.rows if row.is_base)
    for j, metric in enumerate(shown):
        axis: Axes = axes[0, j]
        axis.axvline(0, color=MUTED, linewidth=1, linestyle=":")
        for y, row in enumerate(rows):
            if metric in row.differences:
                d = row.differences[metric]
                axis.errorbar(d.mean, y, xerr=d.half_width, fmt="o", color=OURS, markersize=5.5, capsize=4)
            paper = _paper_difference(row, base, metric)
            if paper is not None:
                axis.plot(paper, y + 0.22, "D", color=PAPER, markerfacecolor=PAGE, markersize=6, markeredgewidth=1.6)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_yticks(range(len(rows)), [row.label for row in rows] if j == 0 else [""] * len(rows))
        axis.set_xlabel(("← better      " if lower_is_better(metric) else "worse      ") + "Δ " + with_unit(metric)
                        + ("      worse" if lower_is_better(metric) else "      better →"))  # fmt: skip
        axis.grid(axis="y", visible=False)
    if any(_paper_difference(row, base, m) is not None for row in rows for m in shown):
        marks = [
            Line2D([], [], color=OURS, marker="o", markersize=5.5, label="this sweep"),
            Line2D(
                [], [], color=PAPER, marker="D", markerfacecolor=PAGE, linestyle="", label="the paper (one run a cell)"
            ),
        ]
        figure.legend(handles=marks, loc="outside upper right", ncols=2, fontsize=9)
    return figure


def _paper_difference(row: Row, base: Row, metric: str) -> float | None:
    """The paper's cell minus its base; a loss that it does not print is the logarithm of its perplexity."""
    ours, theirs = row.paper.get(metric), base.paper.get(metric)
    if ours is not None and theirs is not None:
        return ours - theirs
    if metric.endswith("/loss"):
        name = metric.replace("/loss", "/perplexity")
        if row.paper.get(name) and base.paper.get(name):
            return math.log(row.paper[name] / base.paper[name])
    return None


def curves(results: Results, table: Table) -> Figure | None:
    """The deciding metric by step, of unfinished runs too, and each cell minus the base at the same step and seed."""
    metric = (deciding(results) or [""])[0]
    cells = [cell for cell in results.cells if len(_steps(cell, metric)) > 1]
    if not cells:
        return None
    base = results.base if results.base in cells else None
    figure, axes = panels(1, 2 if base and len(cells) > 1 else 1, 3.9)
    for k, cell in enumerate(cells):
        colour = RAMP(k / max(len(cells) - 1, 1))
        _band(axes[0, 0], cell.curves[metric], colour, results.label(cell.overrides))
        if base and len(cells) > 1:
            mine, theirs = cell.curves[metric], base.curves[metric]
            _band(axes[0, 1], {s: _minus(mine[s], theirs[s]) for s in mine.keys() & theirs.keys()}, colour, None)
            axes[0, 1].set_ylabel(f"minus {results.label(base.overrides)}")
    for axis in axes[0]:
        axis.set_xlabel("training step")
        axis.set_xlim(left=0)
    axes[0, 0].set_ylabel(with_unit(metric))
    figure.legend(loc="outside right center", fontsize=9)
    return figure


def _steps(cell: Cell, metric: str) -> list[int]:
    return sorted({step for points in cell.curves.get(metric, {}).values() for step in points})


def _minus(a: dict[int, float], b: dict[int, float]) -> dict[int, float]:
    return {step: a[step] - b[step] for step in a if step in b}


def _band(axis: Axes, seeds: dict[int, dict[int, float]], colour: tuple[float, ...], label: str | None) -> None:
    steps = sorted({step for points in seeds.values() for step in points})
    columns = [[points[step] for points in seeds.values() if step in points] for step in steps]
    axis.plot(steps, [float(np.mean(c)) for c in columns], color=colour, linewidth=1.8, label=label)
    axis.fill_between(
        steps, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.15, linewidth=0
    )


def cost(results: Results, table: Table) -> Figure | None:
    """Quality against the measured time a token, or against counted FLOPs where no time was measured."""
    metric = (deciding(results) or [""])[0]
    points = [
        (row, price[0], row.estimates[metric])
        for row in table.rows
        if metric in row.estimates and (price := _price(row))
    ]
    units = {_price(row)[1] for row, _, _ in points}  # pyright: ignore[reportOptionalSubscript]
    if len(points) < 2 or len(units) > 1:
        return None
    figure, axes = panels(1, 1, 3.9)
    axis: Axes = axes[0, 0]
    sign = 1 if lower_is_better(metric) else -1
    front = [
        (x, e.mean)
        for row, x, e in points
        if not any(o is not row and ox <= x and sign * oe.mean <= sign * e.mean for o, ox, oe in points)
    ]
    axis.plot(*zip(*sorted(front), strict=True), "o-", color=RAMP(0.0), linewidth=1.5, markersize=13, alpha=0.35)
    for row, x, e in points:
        axis.errorbar(x, e.mean, yerr=e.half_width, fmt="o", color=OURS, markersize=6, capsize=4)
        axis.annotate(row.label, (x, e.mean), (8, 6), textcoords="offset points", fontsize=9)
    axis.set_xlabel(units.pop())
    axis.set_ylabel(with_unit(metric))
    axis.margins(x=0.12)
    return figure


def _price(row: Row) -> tuple[float, str] | None:
    speed = interval(list(row.cell.training("tokens_per_second").values()))
    if speed and speed.mean > 0:
        return 1e6 / speed.mean, "training time per token (µs, all seeds together)"
    flops = row.cell.status.get("flops_per_token")
    return (float(flops), "forward FLOPs per token") if flops else None
