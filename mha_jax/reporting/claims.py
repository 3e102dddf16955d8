"""What a paper says, checked against what we measured: held, not held or undecided.

What a claim may say is in `mha_jax.sweeps.claims`.

In at most 5 % of sweeps is any claim called held that is not true, however many claims there are and however often
seeds are added (docs/claims_simulation.md).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from mha_jax.reporting import power
from mha_jax.reporting.results import Cell, Results
from mha_jax.reporting.statistics import Estimate, holm_rows, p_above, paired
from mha_jax.sweeps.claims import Claim, Equivalence
from mha_jax.training.metrics import lower_is_better

Status = Literal["held", "not held", "undecided"]
_LEVEL = 0.95
_UNITS = {"loss": " nats", "bleu": " BLEU", "bits_per_byte": " bits a byte"}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the runs say. `difference` is the advantage of `better` (Claim), or first minus second (Equivalence)."""

    text: str
    status: Status
    difference: Estimate | None
    sentence: str


def check(claims: Sequence[Claim | Equivalence], results: Results) -> list[Verdict]:
    """Decides all claims of a sweep by the differences of their cells, paired by seed.

    A Claim is held where the two-sided 95 % t interval lies above its margin, not held where it lies below. An
    Equivalence is held where the interval lies within ± margin, not held where it lies outside. With several claims, or
    seeds added after a look, more is asked of those that are held: see `statuses`. Anything else, and anything that
    lacks a run or a second common seed, is undecided.
    """
    compared = [_compare(claim, results) for claim in claims]
    # A claim without an interval counts among the claims all the same: their number was fixed beforehand.
    p = [
        (1.0, 1.0) if d is None or d.error is None else p_values(claim, d.mean, d.error, d.n)
        for claim, (d, _) in zip(claims, compared, strict=True)
    ]
    true, false = np.array(p, float).reshape(-1, 2).T
    looks = len(results.batches)
    verdicts = []
    for i, status in enumerate(statuses(true, false, looks).tolist()):
        difference, lack = compared[i]
        sentence = lack
        if difference is not None and difference.error is not None:
            strict = _strictness(true[i], holm_rows(true)[i], len(claims), looks)
            sentence = _sentence(claims[i], difference, strict, results)
            if status == "undecided":
                sentence += _seeds_to_decide(claims[i], difference, len(claims), looks)
        verdicts.append(Verdict(claims[i].text, status, difference, sentence))
    return verdicts


def p_values(claim: Claim | Equivalence, mean: Any, error: Any, n: int) -> tuple[Any, Any]:
    """Two-sided p-values, the first of the claim being true, the second of its being false; of arrays, arrays.

    Each is at most 0.05 where the 95 % interval lies wholly on that side. To be alike, both one-sided tests must pass
    (Schuirmann 1987); to be unlike, either.
    """
    if isinstance(claim, Claim):
        above = p_above(mean, error, n, claim.margin)
        return _two_sided(above), _two_sided(1 - above)
    upper, lower = p_above(mean, error, n, claim.margin), p_above(mean, error, n, -claim.margin)
    return _two_sided(np.maximum(lower, 1 - upper)), _two_sided(np.minimum(upper, 1 - lower))


def _two_sided(p: Any) -> Any:
    return np.minimum(1.0, 2 * p)


def statuses(true: Float[np.ndarray, "*sweeps m"], false: Float[np.ndarray, "*sweeps m"], looks: int) -> np.ndarray:
    """What a sweep's m claims are called, by `p_values`: "held", "not held" or "undecided", along the last axis.

    Held: p of being true, adjusted over the claims (Holm 1979), is at most `allowed_error(looks)`. Not held: p of being
    false is at most 0.05; this is not adjusted, as a claim that is true is mostly far from its margin.
    """
    held = holm_rows(true) <= allowed_error(looks)
    return np.where(held, "held", np.where(false <= 1 - _LEVEL, "not held", "undecided"))


def allowed_error(looks: int) -> float:
    """The p at which a claim is held: 0.05, and half of it for each further batch of seeds, added after a look.

    A claim that is not true is held on one of the two sides only, so at most 2.5 % are at the first look, 1.25 % more
    at the second, and so on: 5 % over however many looks.
    """
    return (1 - _LEVEL) / 2 ** (looks - 1)


def _compare(claim: Claim | Equivalence, results: Results) -> tuple[Estimate | None, str]:
    """The difference of the claim's cells over their common seeds, and, where it has no interval, why."""
    wanted = _cells(claim)
    cells = [results.find(overrides) for overrides in wanted]
    for overrides, cell in zip(wanted, cells, strict=True):
        lack = _lack(cell, claim.metric)
        if lack:
            return None, f"{results.label(overrides)}: {lack}."
    first, second = (cell.values(claim.metric) for cell in cells if cell is not None)
    if isinstance(claim, Claim) and lower_is_better(claim.metric):
        first, second = second, first
    difference = paired(first, second, _LEVEL)
    n = 0 if difference is None else difference.n
    return difference, f"{n} common seed{'' if n == 1 else 's'}: no interval." if n < 2 else ""


def _cells(claim: Claim | Equivalence) -> Sequence[Mapping[str, Any]]:
    return (claim.better, claim.worse) if isinstance(claim, Claim) else claim.between


def _lack(cell: Cell | None, metric: str) -> str | None:
    if cell is None:
        return "not a cell of this sweep"
    if cell.state != "done":
        return cell.summary
    return None if cell.values(metric) else f"the run has no {metric}"


def _strictness(p: float, adjusted: float, claims: int, looks: int) -> str:
    """What is asked beyond the interval; nothing of a single claim at its first look."""
    if claims == 1 and looks == 1:
        return ""
    over = f", {adjusted:.3f} over {claims} claims" if claims > 1 else ""
    return f"; p = {p:.3f}{over}, held at {allowed_error(looks):g}"


def _sentence(claim: Claim | Equivalence, difference: Estimate, strictness: str, results: Results) -> str:
    unit = _UNITS.get(claim.metric.rsplit("/", 1)[-1], "")
    first, second = map(results.label, _cells(claim))
    spread = f"95 % interval {difference.low:+.4f} to {difference.high:+.4f}, n = {difference.n} seeds"
    if isinstance(claim, Equivalence):
        return (
            f"{claim.metric}: {first} minus {second} = {difference.mean:+.4f}{unit} ({spread}; "
            f"alike means within ±{claim.margin:g}{strictness})."
        )
    word = "better" if difference.mean >= 0 else "worse"
    beyond = f"; must exceed {claim.margin:g}" if claim.margin else ""
    size = f"{abs(difference.mean):.4f}{unit}"
    return f"{claim.metric}: {first} is {size} {word} than {second} (advantage: {spread}{beyond}{strictness})."


def _seeds_to_decide(claim: Claim | Equivalence, difference: Estimate, claims: int, looks: int) -> str:
    """How many seeds would decide it, from the spread seen, at the level that a next look asks of the first claim."""
    spread = (difference.error or 0.0) * difference.n**0.5
    level = 1 - allowed_error(looks + 1) / claims
    if isinstance(claim, Claim):
        seeds, case = power.seeds_needed(difference.mean - claim.margin, spread, level), "the difference is as seen"
    else:
        seeds, case = power.seeds_needed(claim.margin, spread, level, power.power_of_likeness), "the cells are equal"
    return f" If {case}, {power.in_words(seeds)} seeds in all decide it with 80 % power."
