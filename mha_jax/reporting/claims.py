"""What a paper says, checked against what we measured: held, not held or undecided.

A claim in a config is a dict: `{"text", "metric", "better", "worse"}` says that one cell beats another, and
`{"text", "metric", "between": [cell, cell], "margin"}` that two cells are alike. A cell is a dict of overrides.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mha_jax.reporting.results import Cell, Results
from mha_jax.reporting.statistics import Estimate, paired
from mha_jax.specs import UserError
from mha_jax.training.metrics import lower_is_better

Status = Literal["held", "not held", "undecided"]


@dataclasses.dataclass(frozen=True)
class Claim:
    """Cell `better` beats cell `worse` on the metric by more than `margin`."""

    text: str
    metric: str
    better: Mapping[str, Any]
    worse: Mapping[str, Any]
    margin: int | float = 0.0


@dataclasses.dataclass(frozen=True)
class Equivalence:
    """The two cells differ on the metric by less than `margin`, whichever way."""

    text: str
    metric: str
    between: Sequence[Mapping[str, Any]]
    margin: int | float


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the runs say. `difference` is the advantage of `better` (Claim), or first minus second (Equivalence)."""

    text: str
    status: Status
    difference: Estimate | None
    sentence: str


def parse(claim: Mapping[str, Any]) -> Claim | Equivalence:
    """The claim that a config's dict describes. Raises UserError for a dict that is neither kind."""
    kind = Equivalence if "between" in claim else Claim
    try:
        made = kind(**{name: value for name, value in claim.items() if name != "kind"})
    except TypeError as error:
        raise UserError(f"claim {claim.get('text', claim)!r}: {str(error).split('__init__() ')[-1]}") from None
    if isinstance(made, Equivalence) and (len(made.between) != 2 or not made.margin > 0):
        raise UserError(f"claim {made.text!r} needs two cells in 'between' and a margin above 0")
    lower_is_better(made.metric)
    return made


def check(claim: Claim | Equivalence, results: Results) -> Verdict:
    """Decides by the two-sided 95 % t interval of the difference, paired by seed.

    A Claim is held where the whole interval lies above its margin, not held where it lies wholly below. An Equivalence
    is held where the whole interval lies within ± margin, not held where it lies wholly outside. Anything else, and
    anything that lacks a run or a second common seed, is undecided.
    """
    wanted = (claim.better, claim.worse) if isinstance(claim, Claim) else claim.between
    cells = [results.find(overrides) for overrides in wanted]
    for overrides, cell in zip(wanted, cells, strict=True):
        lack = _lack(cell, claim.metric)
        if lack:
            return Verdict(claim.text, "undecided", None, f"{results.label(overrides)}: {lack}.")
    first, second = (cell.values(claim.metric) for cell in cells if cell is not None)
    if isinstance(claim, Claim) and lower_is_better(claim.metric):
        first, second = second, first
    difference = paired(first, second)
    if difference is None or difference.low is None or difference.high is None:
        n = 0 if difference is None else difference.n
        return Verdict(claim.text, "undecided", difference, f"{n} common seed{'' if n == 1 else 's'}: no interval.")
    status = _status(claim, difference.low, difference.high)
    return Verdict(claim.text, status, difference, _sentence(claim, difference, *map(results.label, wanted)))


def _lack(cell: Cell | None, metric: str) -> str | None:
    if cell is None:
        return "not a cell of this sweep"
    if cell.state != "done":
        return cell.summary
    return None if cell.values(metric) else f"the run has no {metric}"


def _status(claim: Claim | Equivalence, low: float, high: float) -> Status:
    inside, outside = low > claim.margin, high <= claim.margin
    if isinstance(claim, Equivalence):
        inside = -claim.margin < low and high < claim.margin
        outside = low >= claim.margin or high <= -claim.margin
    return "held" if inside else "not held" if outside else "undecided"


def _sentence(claim: Claim | Equivalence, difference: Estimate, first: str, second: str) -> str:
    unit = {"loss": " nats", "bleu": " BLEU", "bits_per_byte": " bits a byte"}.get(claim.metric.rsplit("/", 1)[-1], "")
    spread = f"95 % interval {difference.low:+.4f} to {difference.high:+.4f}, n = {difference.n} seeds"
    if isinstance(claim, Equivalence):
        return (
            f"{claim.metric}: {first} minus {second} = {difference.mean:+.4f}{unit} ({spread}; "
            f"alike means within ±{claim.margin:g})."
        )
    word = "better" if difference.mean >= 0 else "worse"
    beyond = f"; must exceed {claim.margin:g}" if claim.margin else ""
    size = f"{abs(difference.mean):.4f}{unit}"
    return f"{claim.metric}: {first} is {size} {word} than {second} (advantage: {spread}{beyond})."
