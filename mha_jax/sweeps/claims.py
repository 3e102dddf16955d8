"""What a config file says that its paper claims and reports, understood before anything is trained.

A claim is a dict: `{"text", "metric", "better", "worse"}` says that one cell beats another, and
`{"text", "metric", "between": [cell, cell], "margin"}` that two cells are alike. A cell is a dict of overrides.
`reporting.claims` checks them against what was measured.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mha_jax.specs import UserError
from mha_jax.training.metrics import lower_is_better


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


def parse(claim: Any) -> Claim | Equivalence:
    """The claim that a config's dict describes. Raises UserError for what is neither kind."""
    if not isinstance(claim, Mapping):
        raise UserError(f"claim {claim!r} must be a dict, with text, metric, better and worse, or between and margin")
    kind = Equivalence if "between" in claim else Claim
    try:
        made = kind(**{name: value for name, value in claim.items() if name != "kind"})
    except TypeError as error:
        raise UserError(f"claim {claim.get('text', claim)!r}: {str(error).split('__init__() ')[-1]}") from None
    cells = (made.better, made.worse) if isinstance(made, Claim) else made.between
    if not isinstance(cells, (tuple, list)) or len(cells) != 2 or not all(isinstance(c, Mapping) for c in cells):
        raise UserError(f"claim {made.text!r} needs two cells, each a dict of overrides, not {cells!r}")
    if not isinstance(made.margin, (int, float)) or not (made.margin > 0 or isinstance(made, Claim)):
        raise UserError(f"claim {made.text!r}: margin={made.margin!r} must be a number, above 0 for two cells alike")
    lower_is_better(str(made.metric))
    return made


def check_paper(paper: Any) -> None:
    """Raises UserError for a PAPER that the report could not set beside the cells."""
    rows = paper.get("rows", []) if isinstance(paper, Mapping) else None
    if not isinstance(rows, (tuple, list)):
        raise UserError(f"PAPER={paper!r} must be a dict, its 'rows' a list")
    for row in rows:
        if not isinstance(row, Mapping) or not isinstance(row.get("cell"), Mapping):
            raise UserError(f"PAPER: row {row!r} must be a dict with a 'cell', a dict of overrides")
