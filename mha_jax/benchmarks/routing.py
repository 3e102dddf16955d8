"""Does routing save time? A layer with a router: all heads computed and gated, and the chosen ones gathered."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from mha_jax.attention import Causal, MultiHeadAttention
from mha_jax.attention.gathered import gathered_attention
from mha_jax.benchmarks.programs import FORWARD, check_modes, chosen_dtype, program
from mha_jax.benchmarks.rounds import paired_ratio, race, summary
from mha_jax.specs import HeadShape, RoutingSpec, UserError

ALL, GATED, GATHERED, SMALLER = "all heads", "gated", "gathered", "so few heads"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is timed: causal self-attention with projections, with so many heads in use for a token.

    Gathering computes `slack` percent more queries a head than an even load would need; fresh routers are near even.
    """

    kind: str = "moh"
    num_heads: int = 16
    active: tuple[int, ...] = (12, 8, 4)
    d_model: int = 512
    length: int = 512
    batch_size: int = 4
    slack: int = 25
    modes: tuple[str, ...] = (FORWARD,)
    rounds: int = 15
    dtype: str | None = None

    def __post_init__(self) -> None:
        check_modes(self.modes)
        shape = HeadShape.resolve(self.d_model, self.num_heads, self.num_kv_heads)
        for active in self.active:
            if active > self.num_heads:
                raise UserError(f"active={active} is more than num_heads={self.num_heads}")
            self.routing(active).check(shape)

    @property
    def num_kv_heads(self) -> int | None:
        """MoA's heads share one key and value."""
        return 1 if self.kind == "moa" else None

    def routing(self, active: int) -> RoutingSpec:
        """With MoH a quarter of the heads in use are shared."""
        shared = active // 4 if self.kind == "moh" else 0
        return RoutingSpec(kind=self.kind, shared=shared, top_k=active - shared)  # pyright: ignore[reportArgumentType]

    def capacity(self, active: int) -> int:
        """Queries of a routed head that are gathered."""
        spec = self.routing(active)
        even = self.length * spec.top_k / (self.num_heads - spec.shared)
        return min(self.length, round(even * (1 + self.slack / 100)))


def flops(setting: Setting, active: int, queries: int | float) -> float:
    """FLOPs a token where each routed head computes `queries` of a row's queries, and all keys and values."""
    spec, width = setting.routing(active), setting.d_model // setting.num_heads
    groups = setting.num_kv_heads or setting.num_heads
    heads = spec.shared + (setting.num_heads - spec.shared) * queries / setting.length
    columns = spec.columns(HeadShape.resolve(setting.d_model, setting.num_heads, setting.num_kv_heads))
    projections = 2 * setting.d_model * (2 * heads * width + 2 * groups * width + columns)
    return projections + 4 * setting.length * heads * width


def measure(setting: Setting) -> dict[str, Any]:
    """Times every way at every number of heads in use, in turns.

    Returns: "rows", one a mode and number of heads in use: "ms" by way, "speedup" of each way over all heads, round by
    round, "flops" a token of the ways relative to all heads gated, "left_out" the share of uses that gathering drops;
    "notes". "so few heads" is a plain layer with no more than the heads in use, as wide each.
    """
    dtype = chosen_dtype(setting.dtype)
    shape = (setting.batch_size, setting.length, setting.d_model)
    x, cotangent = (jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0)))
    rows = []
    for mode in setting.modes:
        calls = {ALL: program(*_contestant(_layer(setting, None), _plain, mode), x, cotangent, jax.devices()[:1]).call}
        for active in setting.active:
            ways = {
                GATED: (_layer(setting, active), _plain),
                GATHERED: (_layer(setting, active), _gathering(setting.capacity(active))),
                SMALLER: (_layer(setting, None, active), _plain),
            }
            for name, (layer, run) in ways.items():
                one = program(*_contestant(layer, run, mode), x, cotangent, jax.devices()[:1])
                calls[f"{name} {active}"] = one.call
        seconds = race(calls, setting.rounds)
        rows += [_row(setting, mode, active, seconds, x) for active in setting.active]
    return {"dtype": dtype, "rows": rows, "notes": []}


def _row(setting: Setting, mode: str, active: int, seconds: dict[str, list[float]], x: Array) -> dict[str, Any]:
    times = {ALL: seconds[ALL]} | {name: seconds[f"{name} {active}"] for name in (GATED, GATHERED, SMALLER)}
    dense = flops(setting, active, setting.length)
    _, left_out = gathered_attention(_layer(setting, active), x, Causal(), setting.capacity(active))
    return {
        "mode": mode,
        "active": active,
        "ms": {name: summary([1e3 * s for s in values]) for name, values in times.items()},
        "speedup": {name: paired_ratio(times[ALL], values) for name, values in times.items() if name != ALL},
        "flops": {GATED: 1.0, GATHERED: flops(setting, active, setting.capacity(active)) / dense},
        "left_out": float(left_out),
        "seconds": times,
    }


def _layer(setting: Setting, active: int | None, heads: int | None = None) -> MultiHeadAttention:
    width = setting.d_model // setting.num_heads
    return MultiHeadAttention(
        setting.d_model,
        heads or setting.num_heads,
        setting.num_kv_heads,
        width,
        width,
        routing=RoutingSpec() if active is None else setting.routing(active),
        rngs=nnx.Rngs(0),
    )


Run = Callable[[MultiHeadAttention, Array], Array]


def _plain(layer: MultiHeadAttention, x: Array) -> Array:
    return layer(x, visibility=Causal())


def _gathering(capacity: int) -> Run:
    return lambda layer, x: gathered_attention(layer, x, Causal(), capacity)[0]


def _contestant(layer: MultiHeadAttention, run: Run, mode: str) -> tuple[Any, str, Any]:
    """The layer as `program` takes it: a function of parameters and input, the mode, the parameters."""
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def apply(params: Any, x: Array) -> Array:
        return run(nnx.merge(graph, params, rest), x)

    return apply, mode, params
