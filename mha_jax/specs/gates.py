"""The section that says how heads are gated, dropped and pruned while the model trains."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from mha_jax.specs.checks import UserError, at_least, choice, rate

_KINDS = ("encoder", "decoder", "cross")


@dataclasses.dataclass(frozen=True)
class GatesSpec:
    """A trained factor a head, heads dropped at random, heads pruned on a schedule; all off by default.

    `kind`: "scalar" learns a factor a head; "hard_concrete" learns how likely a head is open (Louizos et al. 2018,
    Voita et al. 2019) and adds l0_weight * P(gate is not 0), summed over heads, to the nats a target of the loss.
    `where`: kinds of attention that all of this acts on; None: every kind that the task has.
    `l0_weight`: one number, or one for each kind of `where`.
    `initial_log_alpha`: 2 starts with gates 94 % likely to be open.
    `learning_rate_multiplier`: of the gates' own parameters, whose useful range does not shrink with the model's rate.
    `head_drop_rate`: whole heads dropped for an example, the others scaled up (DropHead, Zhou et al. 2020).
    `prune_to`: heads that are left at `prune_end`: a count, or below 1 a share of them. Heads go one by one, the least
    important first, from `prune_start` to `prune_end` (None: the last step).
    """

    kind: Literal["none", "scalar", "hard_concrete"] = "none"
    where: tuple[str, ...] | None = None
    l0_weight: float | Mapping[str, float] = 0.0
    initial_log_alpha: float = 2.0
    learning_rate_multiplier: float = 1.0
    head_drop_rate: float = 0.0
    prune_to: float | None = None
    prune_start: int = 0
    prune_end: int | None = None

    def __post_init__(self) -> None:
        choice("gates.kind", self.kind, ("none", "scalar", "hard_concrete"))
        if self.where is not None and (not self.where or len(set(self.where)) != len(self.where)):
            raise UserError(f"gates.where={self.where!r} must name each kind of attention once, at least one")
        for kind in self.where or ():
            choice("gates.where", kind, _KINDS)
        self._check_weights()
        rate("gates.head_drop_rate", self.head_drop_rate)
        if not self.learning_rate_multiplier > 0:
            raise UserError(f"gates.learning_rate_multiplier={self.learning_rate_multiplier!r} must be positive")
        if self.prune_to is not None:
            self._check_schedule()

    def _check_weights(self) -> None:
        weights = self.l0_weight if isinstance(self.l0_weight, Mapping) else {"": self.l0_weight}
        for kind, weight in weights.items():
            at_least(f"gates.l0_weight{'.' if kind else ''}{kind}", weight, 0, (int, float))
        if any(weights.values()) and self.kind != "hard_concrete":
            raise UserError(f"gates.l0_weight={self.l0_weight!r} needs gates.kind='hard_concrete', not {self.kind!r}")

    def _check_schedule(self) -> None:
        at_least("gates.prune_to", self.prune_to, 0, (int, float))
        if self.prune_to and self.prune_to >= 1 and self.prune_to != round(self.prune_to):
            raise UserError(f"gates.prune_to={self.prune_to} must be a whole number of heads, or a share below 1")
        at_least("gates.prune_start", self.prune_start, 0)
        if self.prune_end is not None:
            at_least("gates.prune_end", self.prune_end, self.prune_start + 1)
        if self.kind == "hard_concrete":
            raise UserError(
                f"gates.prune_to={self.prune_to} prunes by importance and gates.kind='hard_concrete' by its penalty: "
                "choose one"
            )

    @property
    def prunes(self) -> bool:
        """Whether heads can be gone at the end."""
        return self.kind != "none" or self.prune_to is not None

    @property
    def draws(self) -> bool:
        """Whether a training step draws random gates."""
        return self.kind == "hard_concrete" or self.head_drop_rate > 0

    def weight(self, kind: str) -> float:
        """The weight of the penalty for one kind of attention."""
        return self.l0_weight[kind] if isinstance(self.l0_weight, Mapping) else self.l0_weight

    def heads_left(self, heads: int) -> int:
        """How many of so many heads the schedule leaves. Raises: UserError where it asks for more than there are."""
        assert self.prune_to is not None
        left = round(self.prune_to * heads if self.prune_to < 1 else self.prune_to)
        if left > heads:
            raise UserError(f"gates.prune_to={self.prune_to} is more than the {heads} heads that there are")
        return left
