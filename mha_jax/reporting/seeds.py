"""What the seeds at hand show and how many more would: interquartile means, probability of improvement, power."""

import dataclasses
from typing import Any

from mha_jax.reporting import power
from mha_jax.reporting.results import Results
from mha_jax.reporting.statistics import Estimate, improvement, interquartile_mean
from mha_jax.reporting.tables import Row, Table, deciding, decimals, heading, plus_minus
from mha_jax.training.metrics import lower_is_better


@dataclasses.dataclass(frozen=True)
class SeedTable:
    """The page's second table, as text, and what must be known to read it."""

    metric: str
    columns: tuple[str, ...]
    lines: tuple[dict[str, str], ...]
    note: str


def columns(results: Results, table: Table) -> list[dict[str, Any]]:
    """For each row of the table its further columns of table.csv: bare numbers, of every deciding metric."""
    return [
        {
            f"{metric} {name}": value
            for metric in deciding(results)
            for name, value in facts(row, results, metric).items()
        }
        for row in table.rows
    ]


def facts(row: Row, results: Results, metric: str) -> dict[str, float | int | None]:
    """What the row's seeds say about the metric beyond its mean; what they cannot say is absent.

    "IQM": interquartile mean. "P better": probability of being better than the base, seed by seed. "spread": standard
    deviation of the differences from the base. "shows": the difference that as many seeds show with 80 % power.
    "seeds for difference" and "seeds for X": how many seeds would show the difference seen, and X, a margin of the
    study's claims, with 80 % power; empty above 1000.
    """
    found: dict[str, float | int | None] = {}
    iqm = interquartile_mean(list(row.cell.values(metric).values()))
    found |= _with_interval("IQM", iqm)
    difference = row.differences.get(metric)
    if difference is None or results.base is None or difference.error is None:
        return found
    better = improvement(row.cell.values(metric), results.base.values(metric), lower_is_better(metric))
    spread = difference.error * difference.n**0.5
    found |= _with_interval("P better", better)
    found |= {"spread": spread, "shows": power.detectable(spread, difference.n)}
    found["seeds for difference"] = power.seeds_needed(difference.mean, spread)
    return found | {f"seeds for {m:g}": power.seeds_needed(m, spread) for m in _margins(results, metric)}


def make(results: Results, table: Table) -> SeedTable | None:
    """The page's table, of the metric that decides first; None before there is a difference with an interval."""
    metric = (deciding(results) or [""])[0]
    numbers = [facts(row, results, metric) for row in table.rows]
    n = [row.differences[metric].n for row, found in zip(table.rows, numbers, strict=True) if "spread" in found]
    if not n:
        return None
    lines = tuple(_text(row, found, metric) for row, found in zip(table.rows, numbers, strict=True))
    names = tuple(dict.fromkeys(name for line in lines for name in line))
    low, high = power.spread_factors(min(n))
    return SeedTable(
        heading(metric),
        names,
        lines,
        f"IQM: mean of the middle half of the seeds with a bootstrap interval, from 4 seeds on (Agarwal et al. 2021); "
        f"P(better): share of seeds in which the cell beats the base, with its exact interval; spread: standard "
        f"deviation of Δ over seeds; shows: the Δ that as many seeds show with {power.POWER:.0%} power, at p = 0.05; "
        f"seeds for X: how many show X with that power. The spread of {min(n)} seeds may truly be {low:.1f} to "
        f"{high:.1f} times as large, and seeds needed grow with its square.",
    )


def _margins(results: Results, metric: str) -> list[float]:
    """Sizes that the study itself calls worth telling apart."""
    claims = results.sweep.get("claims") or []
    return sorted({abs(c["margin"]) for c in claims if c.get("metric") == metric and c.get("margin")})


def _with_interval(name: str, found: Estimate | None) -> dict[str, float | int | None]:
    return {} if found is None else {name: found.mean, f"{name} low": found.low, f"{name} high": found.high}


def _text(row: Row, found: dict[str, Any], metric: str) -> dict[str, str]:
    d = decimals(metric)
    text = {"cell": row.label, "n": row.text["n"]}
    if metric in row.estimates:
        text["mean"] = plus_minus(metric, row.estimates[metric])
    for name, shown, digits in (("IQM", "IQM", d), ("P better", "P(better)", 2)):
        if name in found:
            low, high = (f"{found[f'{name} {end}']:.{digits}f}" for end in ("low", "high"))
            text[shown] = f"{found[name]:.{digits}f} [{low}, {high}]"
    if "spread" in found:
        text |= {"spread of Δ": f"{found['spread']:.{d + 1}f}", "shows Δ": f"{found['shows']:.{d}f}"}
        difference = row.differences[metric].mean
        text["seeds for Δ seen"] = f"{power.in_words(found['seeds for difference'])} ({difference:+.{d}f})".replace(
            "-", "−"
        )
    needed = {k: v for k, v in found.items() if k.startswith("seeds for ") and k != "seeds for difference"}
    return text | {name: power.in_words(value) for name, value in needed.items()}
