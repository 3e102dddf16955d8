"""cuDNN's fused attention through `jax.nn.dot_product_attention`, for the calls that it is documented to be right for.

Of rules it knows the causal triangle, the last keys before a query, and lengths; it has no place for a row that sees
nothing, and no dropout of ours. All else is refused.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key

from mha_jax.attention.backends.call import Call
from mha_jax.attention.rule import And, Rule
from mha_jax.attention.visibility import Causal, Full, Padding, SlidingWindow

# Widths that its kernels take, by the least compute capability: Ampere, the first with this kernel, and Hopper.
_WIDEST = {(8, 0): 128, (9, 0): 256}


class Arguments(NamedTuple):
    """A rule in the words of `jax.nn.dot_product_attention`. `lengths` [B or 1] hides keys behind them."""

    is_causal: bool = False
    window: int | None = None
    lengths: Any = None

    def options(self, batch: int, keys: int) -> dict[str, Any]:
        """The keyword arguments; an example of length 0 shows its first key, so that no row is empty."""
        options: dict[str, Any] = {"is_causal": self.is_causal}
        if self.window is not None:
            # Keys to the left beside the query itself, and none to the right.
            options["local_window_size"] = (self.window - 1, 0)
        if self.lengths is not None:
            options["key_value_seq_lengths"] = jnp.broadcast_to(jnp.clip(self.lengths, 1, keys), (batch,))
        return options


def translate(rule: Rule, queries: int, keys: int) -> Arguments | str:
    """The arguments that stand for a rule, or why there are none. No row is empty but those of examples of length 0."""
    causal, window, lengths = False, None, None
    for part in _conjuncts(rule):
        if isinstance(part, Causal) and part.offset == 0:
            causal = True
        elif isinstance(part, SlidingWindow) and part.dilation == 1:
            window = part.window if window is None else min(window, part.window)
        elif isinstance(part, Padding):
            lengths = part.lengths if lengths is None else jnp.minimum(lengths, part.lengths)
        elif not isinstance(part, Full):
            told = type(part).__name__ if jax.tree.leaves(part) else part
            return f"it cannot express {told}; Full, Causal(), Causal() & SlidingWindow(w) and Padding would do"
    if causal and queries != keys:
        return f"its causal triangle is for T = S, and T={queries}, S={keys}; Full and Padding would do"
    if window is not None and not causal:
        return "its window looks back only; Causal() & SlidingWindow(w) would do"
    if window is not None and lengths is not None:
        return "behind a length its windows are empty; SlidingWindow or Padding alone would do"
    return Arguments(causal, window, None if lengths is None else jnp.asarray(lengths).astype(jnp.int32))


def refusal(call: Call) -> str | None:
    """Why cuDNN cannot serve a call, and what would do; None where it can."""
    # First: what would do instead of it on a GPU would not do elsewhere.
    if (reason := _device_refusal()) is not None:
        return reason
    if 0 in (call.batch, call.queries, call.keys, call.heads):
        return "it does nothing for empty arrays; backend='einsum' would do"
    if call.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it is for bfloat16 and float16, not {call.dtype}; backend='pallas' would do"
    if call.qk_dim != call.v_dim or call.qk_dim % 8 or not call.qk_dim:
        return f"qk_dim={call.qk_dim}, v_dim={call.v_dim} must be equal and a multiple of 8; backend='pallas' would do"
    if not call.regular:
        return (
            f"heads read the groups {call.groups}, and it can only let neighbouring heads share one; "
            "backend='pallas' would do"
        )
    if call.dropout_rate > 0:
        return "it has no dropout of ours; dropout_rate=0 or backend='pallas' would do"
    found = translate(call.rule, call.queries, call.keys)
    return found if isinstance(found, str) else _width_refusal(call.qk_dim)


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    rule: Rule,
    dropout_rate: float,
    dropout_keys: Key[Array, "B"] | None,
    scale: float | Float[Array, ""],
    groups: tuple[int, ...],
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T H V"]:
    """Attention as `mha_jax.attention.attend` defines it, for calls that `refusal` lets pass.

    Args: implementation: of jax.nn; "xla" takes the same arguments on any platform.
    """
    assert dropout_rate == 0 and dropout_keys is None
    found = translate(rule, q.shape[1], k.shape[1])
    assert isinstance(found, Arguments)
    if not isinstance(scale, (int, float)):
        # The kernel's scale is part of the program.
        q, scale = (q * scale).astype(q.dtype), 1.0
    (batch, queries, _, _), keys = q.shape, k.shape[1]
    if keys % 2 and not found.is_causal and found.lengths is None:
        found = found._replace(lengths=jnp.full(1, keys, jnp.int32))
    if found.lengths is not None:
        k, v = (_zero_behind(x, found.lengths) for x in (k, v))
        # With these and the values zero, an example without keys gives zeroes.
        q = _zero_without_keys(q, found.lengths)
    options = found.options(batch, keys)
    q, k, v = map(_evened, (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, scale=float(scale), implementation=implementation, **options)
    return out[:, :queries]


def _conjuncts(rule: Rule) -> list[Any]:
    if isinstance(rule, And):
        return [part for side in rule.parts for part in _conjuncts(side)]
    return [rule]


def _evened(x_BTHX: Array) -> Array:
    """One more position where their number is odd, of which JAX's kernel has no gradient.

    No real query sees it: it is behind the end of a length, or of a triangle.
    """
    return jnp.pad(x_BTHX, ((0, 0), (0, x_BTHX.shape[1] % 2), (0, 0), (0, 0)))


def _zero_behind(x_BSGX: Array, lengths: Int32[Array, "b"]) -> Array:
    """Keys or values with zeroes behind each example's length: in a product, 0 * NaN would reach others."""
    inside = jnp.arange(x_BSGX.shape[1])[None, :] < lengths[:, None]
    return jnp.where(inside[..., None, None], x_BSGX, 0)


def _zero_without_keys(q_BTHK: Array, lengths: Int32[Array, "b"]) -> Array:
    """Queries with zeroes in the examples that have no keys."""
    return jnp.where((lengths > 0)[:, None, None, None], q_BTHK, 0)


def _widest() -> tuple[int, str]:
    """The widest head that kernels for this GPU take, 0 where there are none, and its compute capability."""
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    parts = capability.split(".")
    version = tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else (0, 0)
    return max((most for least, most in _WIDEST.items() if version >= least), default=0), capability


def _device_refusal() -> str | None:
    platform, (widest, capability) = jax.devices()[0].platform, _widest()
    if platform != "gpu":
        return f"it runs on GPU, and this is {platform}; backend='blockwise' would do"
    if not widest:
        return f"it needs an NVIDIA GPU of compute capability 8.0, not {capability!r}; backend='blockwise' would do"
    return None


def _width_refusal(width: int) -> str | None:
    widest, capability = _widest()
    if width > widest:
        return (
            f"qk_dim=v_dim={width} is above {widest}, the most at compute capability {capability}; "
            f"backend={'pallas' if width <= 256 else 'rows'!r} would do"
        )
    return None
