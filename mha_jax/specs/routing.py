"""Heads that the input chooses: routing of tokens to heads, and learned spans of attention."""

import dataclasses
from typing import Literal

from mha_jax.specs.checks import UserError, at_least, choice
from mha_jax.specs.heads import HeadShape


@dataclasses.dataclass(frozen=True)
class RoutingSpec:
    """Which heads a token uses, in every attention of the model; the token is the one that asks.

    kind "moh": the first `shared` heads always, and `top_k` of the others (Jin et al. 2024). "moa": `top_k` of all
    heads, which share one key and one value (Zhang et al. 2022). "none": all heads, the plain model.

    `balance_weight` and `z_weight` go with the router's losses in the objective; both papers have 0.01 for the first,
    MoA 0.001 for the second.
    """

    kind: Literal["none", "moh", "moa"] = "none"
    shared: int = 0
    top_k: int = 1
    balance_weight: float = 0.01
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        choice("model.routing.kind", self.kind, ("none", "moh", "moa"))
        at_least("model.routing.shared", self.shared, 0)
        at_least("model.routing.top_k", self.top_k, 1)
        for field in ("balance_weight", "z_weight"):
            at_least(f"model.routing.{field}", getattr(self, field), 0, (int, float))
        if self.kind == "moa" and self.shared:
            raise UserError(
                f"model.routing.shared={self.shared} goes with kind='moh'; kind='moa' shares no heads, 0 fits"
            )

    def columns(self, shape: HeadShape) -> int:
        """Scores that the router of one attention computes for a token; 0 where nothing is routed."""
        if self.kind == "none":
            return 0
        return shape.num_heads + (2 if self.shared else 0)

    @property
    def active(self) -> int:
        """Heads that a token uses, of any number."""
        return self.shared + self.top_k

    def check(self, shape: HeadShape) -> None:
        """Raises UserError where an attention of this shape cannot be routed so."""
        if self.kind == "none":
            return
        if self.shared >= shape.num_heads:
            raise UserError(
                f"model.routing.shared={self.shared} leaves no head to route: num_heads={shape.num_heads} "
                f"allows at most {max(shape.num_heads - 1, 0)}"
            )
        routed = shape.num_heads - self.shared
        if self.top_k > routed:
            raise UserError(
                f"model.routing.top_k={self.top_k} is more than the {routed} routed heads "
                f"(num_heads={shape.num_heads}, shared={self.shared}); at most {routed} fit"
            )
        if self.kind == "moa" and shape.num_kv_heads != 1:
            raise UserError(
                f"model.routing.kind='moa' routes over one shared key and value: "
                f"num_kv_heads={shape.num_kv_heads} must be 1"
            )


@dataclasses.dataclass(frozen=True)
class SpanSpec:
    """A learned span for each head of self-attention (Sukhbaatar et al. 2019), in tokens; off where max_span is None.

    A span starts at `init` of max_span; behind it weights fall to 0 over `ramp` tokens. `weight` goes with the sum over
    layers of the mean span over heads, which is added to the objective.
    """

    max_span: int | None = None
    ramp: int = 32
    init: float = 0.0
    weight: float = 2e-6

    def __post_init__(self) -> None:
        if self.max_span is not None:
            at_least("model.adaptive_span.max_span", self.max_span, 1)
        at_least("model.adaptive_span.ramp", self.ramp, 1)
        at_least("model.adaptive_span.weight", self.weight, 0, (int, float))
        if not 0 <= self.init <= 1:
            raise UserError(f"model.adaptive_span.init={self.init!r} must be between 0 and 1, a share of max_span")

    def check_backend(self, name: str) -> None:
        """Raises UserError for a backend of attention that has no spans."""
        if self.max_span is not None and name not in ("auto", "einsum"):
            raise UserError(
                f"model.backend={name!r} has no adaptive spans (model.adaptive_span.max_span={self.max_span}); "
                "'auto' or 'einsum' would do"
            )
