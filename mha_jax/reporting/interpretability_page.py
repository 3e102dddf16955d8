"""The table of interpretability beside quality as text, as Markdown and as a picture."""

import dataclasses

import matplotlib as mpl
import numpy as np
from etils import epath
from matplotlib.axes import Axes

from mha_jax.reporting.canvas import MUTED, OURS, STYLE, Picture, panels, save
from mha_jax.reporting.interpretability import MEASURES, Interpretability, Row, digits, title
from mha_jax.reporting.statistics import Estimate

HEADLINE = "Interpretability against quality"


@dataclasses.dataclass(frozen=True)
class Section:
    """The section of the report: a table as text, sentences below it, and the picture."""

    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    picture: Picture


def section(found: Interpretability, foot: str, directory: epath.Path) -> Section:
    """Draws interpretability.svg and .png, and makes the table."""
    names = (*found.metrics, *found.measures)
    columns = ("cell", *(column for name in names for column in (title(name), f"Δ {title(name)}")), "n")
    return Section(columns, tuple(_line(row, names) for row in found.rows), tuple(_notes(found)),
                _draw(found, foot, directory))  # fmt: skip


def markdown(one: Section) -> str:
    """A Markdown table, then what the columns are."""
    body = [one.columns, ["-" * len(column) for column in one.columns], *one.lines]
    table = "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in body)
    return f"{table}\n\n" + "\n".join(f"- {note}" for note in one.notes) + "\n"


def _line(row: Row, names: tuple[str, ...]) -> tuple[str, ...]:
    texts = [f"{row.label} (base)" if row.is_base and row.label != "base" else row.label]
    for name in names:
        estimate, difference = row.estimates.get(name), row.differences.get(name)
        texts += [_mean(estimate, digits(name)), _difference(difference, digits(name))]
    counts = sorted({estimate.n for estimate in row.estimates.values()})
    return (*texts, " to ".join(dict.fromkeys(str(n) for n in (counts[0], counts[-1]))) if counts else "0")


def _mean(one: Estimate | None, decimals: int) -> str:
    if one is None:
        return "–"
    text = f"{one.mean:.{decimals}f}" + ("" if one.half_width is None else f" ± {one.half_width:.{decimals}f}")
    return text.replace("-", "−")


def _difference(one: Estimate | None, decimals: int) -> str:
    if one is None:
        return "–"
    spread = "" if one.low is None else f" [{one.low:+.{decimals}f}, {one.high:+.{decimals}f}]"
    return f"{one.mean:+.{decimals}f}{spread}".replace("-", "−")


def _notes(found: Interpretability) -> list[str]:
    notes = [
        "Each number is the mean over seeds ± half of its 95 % t interval; Δ is the cell minus the base, paired by "
        "seed, with its 95 % interval, which shows no difference where it holds 0. n: seeds; one alone has no interval."
    ]
    notes += [f"{MEASURES[name].title}: {MEASURES[name].meaning}." for name in found.measures]
    if found.correlations:
        told = [f"{title(m)} and {title(x)} {rho:+.2f} (n = {n})" for m, x, rho, n in found.correlations]
        notes.append(
            "Spearman's rank correlation over the means of n cells, too few for more than a hint: "
            + "; ".join(told).replace("-", "−")
            + "."
        )
    return notes


def _draw(found: Interpretability, foot: str, directory: epath.Path) -> Picture:
    """A panel for each metric and measure, cells from left to right: means with intervals, and every seed."""
    names = [*found.metrics, *found.measures]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    with mpl.rc_context(STYLE):
        figure, axes = panels(rows, columns, 2.3 * rows + 0.4)
        for axis, name in zip(axes.flat, names, strict=False):
            _panel(axis, found, name)
        for axis in axes.flat[len(names) :]:
            axis.set_axis_off()
        svg = save(figure, "interpretability", foot, directory)
    text = "Mean and 95 % interval over seeds of each cell; dots are single seeds. The metrics come first."
    return Picture("interpretability", HEADLINE, text, svg)


def _panel(axis: Axes, found: Interpretability, name: str) -> None:
    for x, row in enumerate(found.rows):
        values, estimate = list(row.values.get(name, {}).values()), row.estimates.get(name)
        if estimate is None:
            continue
        axis.plot(np.full(len(values), x), values, ".", color=MUTED, alpha=0.5, markersize=4)
        axis.errorbar(x, estimate.mean, yerr=estimate.half_width, fmt="o", color=OURS, markersize=5, capsize=3)
    means = [(x, row.estimates[name].mean) for x, row in enumerate(found.rows) if name in row.estimates]
    axis.plot(*zip(*means, strict=True), color=OURS, linewidth=1, alpha=0.5)
    axis.set_title(title(name), fontsize=9)
    axis.set_xticks(range(len(found.rows)), [row.label for row in found.rows], fontsize=8)
    axis.set_xlim(-0.5, len(found.rows) - 0.5)
    axis.tick_params(axis="y", labelsize=8)
