"""The figure of what tuning chose: the metric against each tuned number, a line a cell."""

import math

import matplotlib as mpl
from etils import epath
from matplotlib.axes import Axes

from mha_jax.reporting.canvas import RAMP, STYLE, Picture, panels, save
from mha_jax.reporting.provenance import footer
from mha_jax.reporting.results import Cell, Results
from mha_jax.reporting.tables import short, with_unit
from mha_jax.reporting.trials import chosen, is_number
from mha_jax.sweeps.trials import Trial
from mha_jax.training.metrics import lower_is_better


def draw(results: Results, directory: epath.Path) -> Picture | None:
    """Writes the metric against each tuned number, one line a cell; None where there is nothing to draw yet."""
    trials = [trial for cell in results.cells for trial in cell.trials]
    fields = [
        field
        for field in (results.tuning or {}).get("fields", {})
        if len({trial.values[field] for trial in trials if is_number(trial.values[field])}) > 1
    ]
    if not fields or not any(trial.value is not None for trial in trials):
        return None
    with mpl.rc_context(STYLE):
        figure, axes = panels(1, len(fields), 3.9)
        for axis, field in zip(axes[0], fields, strict=True):
            for k, cell in enumerate(results.cells):
                _line(axis, cell, field, results, RAMP(k / max(len(results.cells) - 1, 1)))
            _dress(axis, field, trials)
        axes[0, 0].set_ylabel(with_unit((results.tuning or {})["metric"]))
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize=9)
        text = "One line a cell, through its best trial at each value; the chosen one is ringed. Crosses: no result."
        return Picture("tuning", "What tuning chose", text, save(figure, "tuning", footer(results), directory))


def _line(axis: Axes, cell: Cell, field: str, results: Results, colour: tuple[float, ...]) -> None:
    sign = 1 if lower_is_better((results.tuning or {})["metric"]) else -1
    by_value: dict[float, float] = {}
    for trial in cell.trials:
        if trial.value is not None:
            x = trial.values[field]
            by_value[x] = min(by_value.get(x, math.inf), sign * trial.value)
    x = sorted(by_value)
    y = [sign * by_value[at] for at in x]
    axis.plot(x, y, "o-", color=colour, markersize=5, label=results.label(cell.overrides))
    best = chosen(cell)
    if best is not None and best.value is not None:
        ring = {"markersize": 12, "markerfacecolor": "none", "markeredgewidth": 1.6}
        axis.plot(best.values[field], best.value, "o", color=colour, **ring)
    lost = [trial.values[field] for trial in cell.trials if trial.settled and trial.lost]
    axis.plot(lost, [0.98] * len(lost), "x", color=colour, transform=axis.get_xaxis_transform())


def _dress(axis: Axes, field: str, trials: list[Trial]) -> None:
    tried = sorted({trial.values[field] for trial in trials})
    if tried[0] > 0 and tried[-1] >= 4 * tried[0]:
        axis.set_xscale("log")
    if len(tried) <= 8:
        axis.set_xticks(tried, [short(value) for value in tried])
        axis.tick_params(axis="x", which="minor", length=0, labelbottom=False)
    axis.set_xlabel(field.rsplit(".", 1)[-1].replace("_", " "))
