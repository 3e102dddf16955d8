"""How often the claims checker is wrong, and how often it finds what is there: sweeps drawn by the thousand.

Every sweep is decided by the functions that decide real ones: `statistics.mean_and_error`, `claims.p_values` and
`claims.statuses`. Losses are drawn as each cell's own noise, so that claims about one base share its luck, as in a real
sweep; the spread of a difference is the standard deviation over seeds, as measured.
"""

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mha_jax.reporting import power
from mha_jax.reporting.claims import Claim, Equivalence, p_values, statuses
from mha_jax.reporting.statistics import mean_and_error, paired
from mha_jax.specs import UserError

SEEDS = (3, 5, 10)
CLAIMS = (1, 5, 10)
# Vaswani et al. 2017, table 3 (A): perplexity 5.29 with one head, 4.92 with eight.
EFFECT = math.log(5.29 / 4.92)
MARGIN = 0.02

Differences = Float[np.ndarray, "*sweeps m n"]
Noise = Callable[[np.random.Generator, tuple[int, int, int]], np.ndarray]
Row = dict[str, Any]


def measured_spreads(file: Path, metric: str = "validation/loss") -> list[float]:
    """Standard deviation over seeds of each run minus the first, from a results.csv; smallest first.

    Raises: UserError for a file that is missing or holds no two runs with two common seeds.
    """
    if not file.exists():
        raise UserError(f"{file} does not exist; give the results.csv of a sweep")
    runs: dict[str, dict[int, float]] = {}
    with file.open() as lines:
        for row in csv.DictReader(lines):
            if row.get(metric):
                runs.setdefault(row["run"], {})[int(row["seed"])] = float(row[metric])
    first, *others = runs.values() or [{}]
    found = [paired(values, first) for values in others]
    spreads = sorted(d.error * math.sqrt(d.n) for d in found if d is not None and d.error)
    if not spreads:
        raise UserError(f"{file} holds no two runs with two common seeds of {metric}")
    return spreads


def normal(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    return rng.standard_normal(shape)


def heavy_tails(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Student's t with 3 degrees of freedom, whose variance is 3."""
    return rng.standard_t(3, shape) / math.sqrt(3)


def skewed_and_unequal(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Exponential noise, three times as wide in every cell but the base: its differences lean to one side."""
    noise = rng.standard_exponential(shape) - 1
    width = np.where(np.arange(shape[1]) == 0, 1.0, 3.0) / math.sqrt(5)
    return noise * width[:, None]


def restless_seeds(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """One seed in five shakes every cell five times as much as the others do."""
    width = np.where(rng.random((shape[0], 1, shape[2])) < 0.2, 5.0, 1.0) / math.sqrt(0.8 + 0.2 * 25)
    return rng.standard_normal(shape) * width


def seeds_alike(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """A tenth of the variance of a cell is common to all its seeds, as if they shared their data order."""
    own, common = rng.standard_normal(shape), rng.standard_normal((*shape[:2], 1))
    return math.sqrt(0.9) * own + math.sqrt(0.1) * common


NOISES: Mapping[str, Noise] = {
    "normal": normal,
    "heavy tails (t with 3 df)": heavy_tails,
    "skewed, unequal between cells": skewed_and_unequal,
    "unequal between seeds": restless_seeds,
    "seeds correlated (0.1)": seeds_alike,
}


def draw(
    rng: np.random.Generator, sweeps: int, claims: int, n: int, spread: float, noise: Noise = normal
) -> Differences:
    """Base minus each of so many cells, seed by seed, without any effect."""
    losses = noise(rng, (sweeps, claims + 1, n)) * (spread / math.sqrt(2))
    return losses[:, :1] - losses[:, 1:]


def decide(claim: Claim | Equivalence, differences: Differences, looks: int = 1) -> np.ndarray:
    """What the checker calls each claim of each sweep."""
    mean, error = mean_and_error(differences)
    true, false = p_values(claim, mean, error, differences.shape[-1])
    return statuses(true, false, looks)


def one_by_one(claim: Claim | Equivalence, differences: Differences) -> np.ndarray:
    """The same with each claim decided as if it were the sweep's only one, at its first look."""
    return decide(claim, differences[:, :, None])[:, :, 0]


BETTER = Claim("", "validation/loss", {}, {})
ALIKE = Equivalence("", "validation/loss", ({}, {}), MARGIN)


def simulate(spreads: Sequence[float], sweeps: int, seed: int = 0) -> list[Row]:
    """All rows of the page. Rates are shares of sweeps; "held" counts a sweep in which any claim is called held."""
    rng = np.random.default_rng(seed)
    chosen = (spreads[0], spreads[len(spreads) // 2], spreads[-1])
    parts = (_no_effect, _many_claims, _added_seeds, _other_noise, _effect, _equal_cells)
    return [row for part in parts for row in part(rng, sweeps, chosen)]


def rows_of(rows: Sequence[Row], part: str) -> list[Row]:
    return [row for row in rows if row["part"] == part]


def _no_effect(rng: np.random.Generator, sweeps: int, spreads: Sequence[float]) -> Iterator[Row]:
    for claim, truth, text in (
        (BETTER, 0.0, "better, truth: equal"),
        (ALIKE, MARGIN, f"alike within {MARGIN:g}, truth: {MARGIN:g} apart"),
    ):
        for spread in spreads:
            for n in SEEDS:
                found = decide(claim, draw(rng, sweeps, 1, n, spread) + truth)
                yield {"part": "no effect", "case": text, "spread": spread, "seeds": str(n), **_rates(found)}


def _many_claims(rng: np.random.Generator, sweeps: int, spreads: Sequence[float]) -> Iterator[Row]:
    for m in CLAIMS:
        for n in SEEDS:
            differences = draw(rng, sweeps, m, n, spreads[1])
            alone = {"held one by one": _any(one_by_one(BETTER, differences), "held")}
            yield {"part": "claims", "claims": m, "seeds": str(n), **alone, **_rates(decide(BETTER, differences))}


def _added_seeds(rng: np.random.Generator, sweeps: int, spreads: Sequence[float]) -> Iterator[Row]:
    """Seeds are added until a claim is held: who stops at the first success."""
    plans: list[list[int]] = [[3, 10], [3, 5, 10], list(range(3, 11))]
    for plan in plans:
        for m in (1, 5):
            differences = draw(rng, sweeps, m, plan[-1], spreads[1])
            naive = [decide(BETTER, differences[:, :, :n]) for n in plan]
            found = [decide(BETTER, differences[:, :, :n], looks) for looks, n in enumerate(plan, 1)]
            told = "3, then one by one to 10" if len(plan) > 3 else ", then ".join(map(str, plan))
            yield {
                "part": "added seeds", "claims": m, "seeds": told,
                "held as if planned": float(np.mean(np.any([s == "held" for s in naive], axis=(0, 2)))),
                "held": float(np.mean(np.any([s == "held" for s in found], axis=(0, 2)))),
            }  # fmt: skip


def _other_noise(rng: np.random.Generator, sweeps: int, spreads: Sequence[float]) -> Iterator[Row]:
    for name, noise in NOISES.items():
        for n in SEEDS:
            differences = draw(rng, sweeps, 1, n, spreads[1], noise)
            other = {"held, cells swapped": _any(decide(BETTER, -differences), "held")}
            yield {"part": "noise", "case": name, "seeds": str(n), **_rates(decide(BETTER, differences)), **other}


def _effect(rng: np.random.Generator, sweeps: int, spreads: Sequence[float]) -> Iterator[Row]:
    """One claim of m is true, by EFFECT: how often that one is held."""
    for spread in spreads:
        for n in SEEDS:
            row: Row = {"part": "effect", "spread": spread, "seeds": str(n), "computed": power.power(EFFECT, spread, n)}
            for m in (1, 3, 10):
                differences = draw(rng, sweeps, m, n, spread)
                differences[:, 0] += EFFECT
                first = decide(BETTER, differences)[:, 0]
                row[f"held of {m}"] = float(np.mean(first == "held"))
                row["not held"] = max(row.get("not held", 0.0), float(np.mean(first == "not held")))
            yield row


def _equal_cells(rng: np.random.Generator, sweeps: int, spreads: Sequence[float]) -> Iterator[Row]:
    for spread in spreads:
        for n in SEEDS:
            found = decide(ALIKE, draw(rng, sweeps, 1, n, spread))
            computed = {"computed": power.power_of_likeness(MARGIN, spread, n)}
            yield {"part": "equal cells", "spread": spread, "seeds": str(n), **computed, **_rates(found)}


def _rates(found: np.ndarray) -> Row:
    return {name: _any(found, name) for name in ("held", "not held")} | {
        "undecided": float(np.mean(np.all(found == "undecided", -1)))
    }


def _any(found: np.ndarray, status: str) -> float:
    return float(np.mean(np.any(found == status, axis=-1)))
