"""What heads are worth, as rows, as a table for the terminal, and as a heat map of layers by heads."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from etils import epath
from matplotlib.axes import Axes

from mha_jax.heads.capture import kind_of, layer_of
from mha_jax.heads.tables import HeadTable, by_kind
from mha_jax.reporting.canvas import INK, RULE, STYLE, panels, save

Tables = Mapping[str, HeadTable]
KINDS = {"encoder": "encoder self-attention", "decoder": "decoder self-attention", "cross": "cross-attention"}
SIGNIFICANT = 0.05


def rows(tables: Tables) -> list[dict[str, Any]]:
    """One row a head: kind, layer, head, then each measure with its "se", and its "p holm" where it has a test."""
    means = {measure: table.mean for measure, table in tables.items()}
    errors = {measure: table.standard_error or {} for measure, table in tables.items()}
    p_values = {measure: table.p_values or {} for measure, table in tables.items()}
    found = []
    for name, first_H in next(iter(means.values())).items():
        for head in range(len(first_H)):
            row: dict[str, Any] = {"kind": kind_of(name), "layer": layer_of(name), "head": head}
            for measure in tables:
                row[measure] = float(means[measure][name][head])
                for column, values in ((f"{measure} se", errors[measure]), (f"{measure} p holm", p_values[measure])):
                    row |= {column: float(values[name][head])} if name in values else {}
            found.append(row)
    return sorted(found, key=lambda row: (list(KINDS).index(row["kind"]), row["layer"], row["head"]))


def text(tables: Tables) -> str:
    """One table a kind: rows are heads, columns measures, each mean±standard error; * where p holm is below 0.05."""
    parts = []
    every = rows(tables)
    for kind, title in KINDS.items():
        lines = [["layer", "head", *tables]]
        lines += [[str(r["layer"]), str(r["head"]), *(_cell(r, m) for m in tables)] for r in every if r["kind"] == kind]
        if len(lines) > 1:
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            body = ("  ".join(x.rjust(w) for x, w in zip(line, widths, strict=True)) for line in lines)
            parts.append("\n".join([title, *body]))
    return "\n\n".join(parts) or "there are no heads"


def _cell(row: Mapping[str, Any], measure: str) -> str:
    value = f"{row[measure]:.3g}"
    if f"{measure} se" in row:
        value += f"±{row[f'{measure} se']:.1g}"
    return value + ("*" if row.get(f"{measure} p holm", 1) < SIGNIFICANT else "")


def stability_text(tables: Tables, over_seeds: Mapping[str, Mapping[str, float | None] | None]) -> str:
    """One line a measure that reads data: Spearman's rank correlation between halves of the batches, and of seeds."""
    lines = []
    for measure, table in tables.items():
        found = [("batches", table.stability), ("seeds", over_seeds.get(measure))]
        told = [
            f"{what} " + ", ".join(f"{kind} {'–' if r is None else format(r, '.2f')}" for kind, r in kinds.items())
            for what, kinds in found
            if kinds is not None
        ]
        lines += [f"rank stability of {measure}: {'; '.join(told)}"] if told else []
    return "\n".join(lines)


def as_json(tables: Tables) -> dict[str, Any]:
    """{measure: {"exact", "stability", "heads": {attention: {"mean", "standard_error", "p_holm"}}}}.

    Lists have one number a head, more being more important; what a measure does not have is null.
    """

    def listed(values: Mapping[str, np.ndarray] | None, name: str) -> list[float] | None:
        return None if values is None else [float(x) for x in values[name]]

    return {
        measure: {
            "exact": table.exact,
            "stability": table.stability,
            "heads": {
                name: {
                    "mean": listed(mean, name),
                    "standard_error": listed(table.standard_error, name),
                    "p_holm": listed(table.p_values, name),
                }
                for name in mean
            },
        }
        for measure, table in tables.items()
        for mean in [table.mean]
    }


def draw(tables: Tables, name: str, foot: str, directory: epath.Path) -> None:
    """Writes NAME.svg and NAME.png: layers by heads, a row of panels for each measure, a column for each kind.

    Every panel has its own scale, told in its title: white is 0, blue is more and red below 0. A dot marks a head whose
    value has a p holm below 0.05; grey is no head.
    """
    means = {measure: by_kind(table.mean) for measure, table in tables.items()}
    kinds = [kind for kind in KINDS if any(kind in found for found in means.values())]
    layers = {kind: [layer_of(name) for name in next(iter(means.values()))[kind]] for kind in kinds}
    height = 0.6 + len(tables) * (0.9 + 0.2 * max(map(len, layers.values())))
    with mpl.rc_context(STYLE):
        figure, axes = panels(len(tables), len(kinds), height)
        for i, (measure, table) in enumerate(tables.items()):
            for j, kind in enumerate(kinds):
                top = _panel(axes[i, j], means[measure][kind], table.p_values)
                axes[i, j].set_title(f"{measure} · {kind} · {top}", fontsize=8)
                named = j == 0 or layers[kind] != layers[kinds[0]]
                axes[i, j].tick_params(labelbottom=i == len(tables) - 1, labelleft=named)
            axes[i, 0].set_ylabel("layer")
        for axis in axes[-1]:
            axis.set_xlabel("head")
        save(figure, name, f"{foot} · dot: Holm-adjusted p below {SIGNIFICANT}", directory)


def _panel(axis: Axes, heads: Mapping[str, np.ndarray], p_values: Mapping[str, np.ndarray] | None) -> str:
    """Draws one panel. Returns what its colours span."""
    widest = max(1, *map(len, heads.values()))
    grid = np.full((len(heads), widest), np.nan)
    for row, values_H in zip(grid, heads.values(), strict=True):
        row[: len(values_H)] = values_H
    signed = bool(np.nanmin(grid, initial=0) < 0)
    top = float(np.nanmax(np.abs(grid), initial=0)) or 1.0
    axis.imshow(grid, aspect="auto", cmap="RdBu" if signed else "Blues", vmin=-top if signed else 0, vmax=top)
    axis.set_facecolor(RULE)
    axis.grid(visible=False)
    axis.set_xticks(range(0, widest, 1 + widest // 17))
    axis.set_yticks(range(len(heads)), [str(layer_of(name)) for name in heads])
    for y, name in enumerate(heads):
        marked = [] if p_values is None else np.flatnonzero(np.asarray(p_values[name]) < SIGNIFICANT)
        axis.plot(marked, [y] * len(marked), "o", color=INK, markeredgecolor="white", markersize=4)
    # A colour bar in every panel would double the time that the picture takes.
    return f"{'±' if signed else '0 to '}{top:.2g}"
