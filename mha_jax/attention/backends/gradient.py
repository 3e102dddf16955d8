"""A backend's forward and backward pass as one function with a gradient, which keeps the output and the log-sum-exp."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array


def differentiable(forward: Callable[..., tuple[Array, ...]], backward: Callable[..., tuple[Array, ...]]) -> Any:
    """The function (plan, rule, words, q, k, v) -> output; the plan is static, rule and dropout's words have no slopes.

    Args:
      forward: (plan, rule, words, q, k, v) -> output, log-sum-exp of every row, and whatever else, which is dropped.
      backward: (plan, rule, words, [q, k, v], output, log-sum-exp, slopes of the output) -> those of q, k and v.
    """

    def output(plan: Any, rule: Any, words: Any, q: Array, k: Array, v: Array) -> Array:
        return forward(plan, rule, words, q, k, v)[0]

    def save(plan: Any, rule: Any, words: Any, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
        out, lse, *_ = forward(plan, rule, words, q, k, v)
        return out, (rule, words, q, k, v, out, lse)

    def slopes(plan: Any, saved: Any, dout: Array) -> tuple[Any, ...]:
        rule, words, *arrays, out, lse = saved
        return None, None, *backward(plan, rule, words, arrays, out, lse, dout)

    attention = jax.custom_vjp(output, nondiff_argnums=(0,))
    attention.defvjp(save, slopes)
    return attention
