"""One figure a benchmark, drawn from its JSON: time against heads or length, ours in blue."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mha_jax.benchmarks import attention, decode, sparse, train_step
from mha_jax.reporting.canvas import MUTED, OURS, STYLE, panels, save

Result = dict[str, Any]
_COLOURS = mpl.colormaps["tab10"]
Line = Sequence[tuple[int, Mapping[str, float]]]


def _draw(axes: Axes, lines: Mapping[str, Line], first: str, xlabel: str, ylabel: str = "milliseconds") -> None:
    """Medians with bars from least to greatest, on logarithmic axes; `first` stands out, what is a limit is dashed."""
    limits = (attention.FLOOR, train_step.FLOOR, decode.FLOOR, sparse.DENSE)
    others = [name for name in lines if name != first and name not in limits]
    for name, points in lines.items():
        if not points:
            continue
        color = OURS if name == first else MUTED if name in limits else _COLOURS(1 + others.index(name) % 9)
        medians = [ms["median"] for _, ms in points]
        bars = [[ms["median"] - ms["min"] for _, ms in points], [ms["max"] - ms["median"] for _, ms in points]]
        style: Any = {
            "linestyle": "--" if name in limits else ":" if name.endswith("one device") else "-",
            "linewidth": 2.2 if name == first else 1.2,
        }
        axes.errorbar([x for x, _ in points], medians, bars, label=name, color=color, marker="o", markersize=3, **style)
    ticks = sorted({x for points in lines.values() for x, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_yscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)


def _legend(figure: Figure) -> Figure:
    """One legend for all panels, above them, where no line of provenance stands."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found |= {label: handle for label, handle in zip(labels, handles, strict=True) if label not in found}
    figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=4, fontsize=8)
    return figure


def _contestants(rows: Sequence[dict[str, Any]], x: str, names: Iterable[str], times: str = "ms") -> dict[str, Line]:
    """A line a contestant, empty where it did not run here, so that a name keeps its colour in all panels."""
    return {name: [(row[x], row[times][name]) for row in rows if name in row[times]] for name in names}


def _names(result: Result, times: str = "ms") -> list[str]:
    return list(dict.fromkeys(name for row in result["rows"] for name in row[times]))


def attention_figure(result: Result) -> Figure:
    """A panel a mode: milliseconds by heads."""
    modes = list(dict.fromkeys(row["mode"] for row in result["rows"]))
    figure, axes = panels(1, len(modes), 4.6)
    for panel, mode in zip(axes[0], modes, strict=True):
        rows = [row for row in result["rows"] if row["mode"] == mode]
        _draw(panel, _contestants(rows, "num_heads", _names(result)), attention.OURS, "heads")
        panel.set_title(mode)
    return _legend(figure)


def train_step_figure(result: Result) -> Figure:
    """Milliseconds a step by heads."""
    figure, axes = panels(1, 1, 4.2)
    _draw(
        axes[0, 0],
        _contestants(result["rows"], "num_heads", _names(result, "step_ms"), "step_ms"),
        train_step.OURS,
        "heads",
    )
    return _legend(figure)


def sparse_figure(result: Result) -> Figure:
    """A panel a mode: milliseconds by length, a line a rule."""
    modes = list(dict.fromkeys(row["mode"] for row in result["rows"]))
    figure, axes = panels(1, len(modes), 4.6)
    for panel, mode in zip(axes[0], modes, strict=True):
        rows = [row for row in result["rows"] if row["mode"] == mode]
        rules = dict.fromkeys(row["rule"] for row in rows)
        lines = {rule: [(row["length"], row["ms"]) for row in rows if row["rule"] == rule] for rule in rules}
        _draw(panel, lines, next((rule for rule in rules if rule.startswith("window")), ""), "length")
        panel.set_title(mode)
    return _legend(figure)


def decode_figure(result: Result) -> Figure:
    """A panel a number of groups and head count: milliseconds a token by the length of the cache."""
    shapes = sorted({(row["num_heads"], row["num_kv_heads"]) for row in result["rows"]})
    heads, groups = (sorted({shape[i] for shape in shapes}) for i in (0, 1))
    figure, axes = panels(len(heads), len(groups), 3.2 * len(heads))
    for r, h in enumerate(heads):
        for c, g in enumerate(groups):
            rows = [row for row in result["rows"] if (row["num_heads"], row["num_kv_heads"]) == (h, g)]
            axes[r, c].set_visible(bool(rows))
            if rows:
                _draw(
                    axes[r, c],
                    _contestants(rows, "length", _names(result)),
                    decode.OURS,
                    "length",
                    "milliseconds a token",
                )
                axes[r, c].set_title(f"{h} heads, {g} of keys and values")
    return _legend(figure)


def write(figure_of: Callable[[Result], Figure], result: Result, path: Path) -> None:
    """The figure as PATH.svg and PATH.png, whatever the ending of `path`, with machine and versions at the foot."""
    machine, versions = result["environment"], result["environment"]["versions"]
    told = [f"{name} {versions[name]}" for name in ("jax", "torch") if name in versions]
    foot = " · ".join([machine["processor"], f"{machine['cores']} cores", machine["device"], *told])
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        save(figure_of(result), path.stem, foot, epath.Path(path.parent))
