"""Do more heads buy quality, or heads that a person can read? The metric of each cell beside what its heads are.

Reads what the verbs of `experiments.heads` left in RUN/heads/ of every finished run; a verb that was not run leaves its
columns out. Every number is one of each seed, so that intervals and differences are over seeds, as in the main table.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from mha_jax.heads.tables import spearman
from mha_jax.reporting.results import Cell, Results
from mha_jax.reporting.statistics import Estimate, holm, interval, paired
from mha_jax.reporting.tables import deciding, decimals, head_shape, with_unit
from mha_jax.sweeps.store import read_json

TOLERANCE = 0.01  # nats a target by which the loss may rise when heads go
_LEVEL = 0.05

Seeds = dict[int, float]


@dataclasses.dataclass(frozen=True)
class Measure:
    """A column: how it is called, with how many decimals, and what it is, in words."""

    title: str
    decimals: int
    meaning: str


MEASURES = {
    "heads_with_role": Measure("heads with a role", 1, "heads that have any role of roles.json"),
    "share_with_role": Measure("share with a role", 2, "the same as a share of all heads"),
    "role_entropy": Measure(
        "role entropy (nats)", 2, "Shannon entropy of the main roles of the heads that have one; 0 where none has"
    ),
    "role_strength": Measure(
        "role strength", 2, "how far above chance each head's most marked role of where it looks is, (score − chance) "
        "/ (1 − chance), mean over heads; no threshold decides it"
    ),
    "role_strength_elsewhere": Measure(
        "strength elsewhere", 2, "the same where attention of a token to itself is no role: that is scarcely a look"
    ),
    "similarity": Measure(
        "similarity in a layer", 2, "of two heads of one attention (redundancy.json), mean over pairs and layers"
    ),
    "free_alone": Measure(
        "free alone (share)", 2, f"heads without each of which the loss does not rise (paired test, Holm p ≥ {_LEVEL})"
    ),
    "removable": Measure(
        "removable heads", 1, f"the most heads that go at once, in the curve's order, for at most {TOLERANCE:g} nats"
    ),
    "share_removable": Measure("share removable", 2, "the same as a share of all heads"),
    "best_selectivity": Measure(
        "best selectivity", 3, "probe accuracy less that of its control task, of the best head, mean over probe tasks; "
        "the best of more heads is higher by chance too"
    ),
    "mean_selectivity": Measure("mean selectivity", 3, "the same, mean over heads and probe tasks"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """A finished cell: its numbers by seed, their means, and their differences to the base, paired by seed."""

    label: str
    is_base: bool
    cell: Cell
    values: Mapping[str, Seeds]
    estimates: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]
    adjusted: Mapping[str, float | None]  # p of the differences, Holm over the rows


@dataclasses.dataclass(frozen=True)
class Interpretability:
    """Metrics and measures that any cell has, the rows, and rank correlations over cells: (metric, measure, rho, n)."""

    metrics: tuple[str, ...]
    measures: tuple[str, ...]
    rows: tuple[Row, ...]
    correlations: tuple[tuple[str, str, float, int], ...]


def make(results: Results, workdir: epath.PathLike) -> Interpretability | None:
    """None where no finished run has been looked into. Raises: UserError where a file of a verb is damaged."""
    directory, metrics = epath.Path(workdir) / "runs", deciding(results)
    found = [{m: cell.values(m) for m in metrics} | _of_cell(cell, directory) for cell in results.done]
    measures = [name for name in MEASURES if any(name in own for own in found)]
    if not measures:
        return None
    names = [*metrics, *measures]
    at_base = next((own for cell, own in zip(results.done, found, strict=True) if cell is results.base), {})
    differences = [
        {} if own is at_base else {m: d for m in names if (d := paired(own.get(m, {}), at_base.get(m, {})))}
        for own in found
    ]
    adjusted = {m: holm([d[m].p if m in d else None for d in differences]) for m in names}
    rows = [
        Row(
            label=results.label(cell.overrides),
            is_base=cell is results.base,
            cell=cell,
            values=own,
            estimates={m: e for m in names if (e := interval(list(own.get(m, {}).values())))},
            differences=differences[i],
            adjusted={m: adjusted[m][i] for m in names},
        )
        for i, (cell, own) in enumerate(zip(results.done, found, strict=True))
    ]
    return Interpretability(tuple(metrics), tuple(measures), tuple(rows), tuple(_correlations(rows, metrics, measures)))


def _of_cell(cell: Cell, directory: epath.Path) -> dict[str, Seeds]:
    """The measures of all runs of a cell that count, merged by seed."""
    merged: dict[str, Seeds] = {}
    for run in cell.counted:
        for name, values in of_run(directory / run.run / "heads").items():
            merged.setdefault(name, {}).update(values)
    return merged


def of_run(heads: epath.PathLike) -> dict[str, Seeds]:
    """{measure: {seed: number}} of what lies in RUN/heads/."""
    found: dict[str, Seeds] = {}
    for name, read in (
        ("roles", _roles),
        ("redundancy", _redundancy),
        ("importance", _importance),
        ("curve", _curve),
        ("probes", _probes),
    ):
        file = epath.Path(heads) / f"{name}.json"
        for seed, measure, value in read(read_json(file)) if file.exists() else ():
            found.setdefault(measure, {})[int(seed)] = value
    return found


Numbers = Iterator[tuple[Any, str, float]]  # seed, measure, number


def _roles(told: Mapping[str, Any]) -> Numbers:
    for seed, one in told["seeds"].items():
        roles = [role for own in one["attentions"].values() for role in own["role"]]
        counts = np.array(list(Counter(role for role in roles if role).values()), float)
        shares = counts / max(counts.sum(), 1)
        yield seed, "heads_with_role", float(counts.sum())
        yield seed, "share_with_role", float(counts.sum() / max(len(roles), 1))
        yield seed, "role_entropy", float(-(shares * np.log(shares)).sum()) + 0.0
        for part in ("strength", "strength_elsewhere"):
            strengths = [x for own in one["attentions"].values() for x in own.get(part, ())]
            if strengths:
                yield seed, f"role_{part}", float(np.mean(strengths))


def _redundancy(told: Mapping[str, Any]) -> Numbers:
    for seed, layers in told.get("within_layers", {}).items():
        if layers:
            yield seed, "similarity", float(np.mean(list(layers.values())))


def _importance(told: Mapping[str, Any]) -> Numbers:
    for seed, measures in told["seeds"].items():
        heads = measures.get("leave_one_out", {}).get("heads", {}).values()
        rises = [x for own in heads for x in own["mean"]]
        p_values = [p for own in heads for p in own["p_holm"] or ()]
        if p_values:
            free = [rise <= 0 or p is None or p >= _LEVEL for rise, p in zip(rises, p_values, strict=True)]
            yield seed, "free_alone", float(np.mean(free))


def _curve(told: Mapping[str, Any]) -> Numbers:
    """Of the curve over all heads; the loss is the whole model's plus at most the tolerance at every point before."""
    rows = [row for row in told["rows"] if row["kind"] == "all" and row["order"] == told["order"] and not row["draw"]]
    for seed in dict.fromkeys(row["seed"] for row in rows):
        points = sorted((row for row in rows if row["seed"] == seed), key=lambda row: -row["left"])
        whole, gone = points[0], 0
        for row in points:
            if row["loss"] - whole["loss"] > TOLERANCE:
                break
            gone = whole["left"] - row["left"]
        yield seed, "removable", float(gone)
        yield seed, "share_removable", gone / max(whole["left"], 1)


def _probes(told: Mapping[str, Any]) -> Numbers:
    for seed, one in told["seeds"].items():
        found = []
        for task in one["tasks"].values():
            numbers = [x for own in task["heads"].values() for x in own["selectivity"]]
            found += [numbers] if numbers else []
        if found:
            yield seed, "best_selectivity", float(np.mean([max(numbers) for numbers in found]))
            yield seed, "mean_selectivity", float(np.mean([np.mean(numbers) for numbers in found]))


def _correlations(rows: list[Row], metrics: list[str], measures: list[str]) -> Iterator[tuple[str, str, float, int]]:
    """Spearman's, between means of cells, where at least three have both and neither is constant."""
    for metric in metrics:
        for measure in measures:
            pairs = [
                (row.estimates[metric].mean, row.estimates[measure].mean)
                for row in rows
                if metric in row.estimates and measure in row.estimates
            ]
            rho = spearman(*np.array(pairs).reshape(-1, 2).T)
            if rho is not None:
                yield metric, measure, rho, len(pairs)


def title(name: str) -> str:
    """A column's head."""
    return MEASURES[name].title if name in MEASURES else with_unit(name)


def digits(name: str) -> int:
    return MEASURES[name].decimals if name in MEASURES else decimals(name)


def as_rows(found: Interpretability) -> list[dict[str, Any]]:
    """The lines of interpretability.csv: one a cell; numbers bare, mean, low, high, n and p in columns of their own."""
    lines = []
    for row in found.rows:
        line: dict[str, Any] = {"run": row.cell.run, "cell": row.label, "base": row.is_base, **head_shape(row.cell)}
        for name in (*found.metrics, *found.measures):
            e, d = row.estimates.get(name), row.differences.get(name)
            if e:
                line |= {name: e.mean, f"{name} low": e.low, f"{name} high": e.high, f"{name} n": e.n}
            if d:
                line |= {f"{name} difference": d.mean, f"{name} difference low": d.low}
                line |= {f"{name} difference high": d.high, f"{name} p": d.p, f"{name} p holm": row.adjusted[name]}
        lines.append(line)
    return lines
