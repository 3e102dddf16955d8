"""The product of rows and a kernel, with a backward pass in the form that a CPU does quickest."""

from typing import Any

import jax
from jaxtyping import Array, Float

from mha_jax.attention.target import target


@jax.custom_vjp
def product(x_NI: Float[Array, "N I"], kernel_IO: Float[Array, "I O"]) -> Float[Array, "N O"]:
    """x @ kernel.

    On CPU the kernel's gradient x.T @ dy is half as slow again where x is wider than y: XLA reads x along its columns,
    whichever order of the product it is given. A copy of x.T that it may not merge with the product costs less.
    """
    return x_NI @ kernel_IO


def _forward(x_NI: Array, kernel_IO: Array) -> tuple[Array, tuple[Array, Array]]:
    return x_NI @ kernel_IO, (x_NI, kernel_IO)


def _backward(saved: tuple[Array, Array], dy_NO: Array) -> tuple[Array, Array]:
    x_NI, kernel_IO = saved
    x_IN = x_NI.T
    if target() == "cpu" and x_NI.shape[1] > dy_NO.shape[1]:
        x_IN = jax.lax.optimization_barrier(x_IN)
    return dy_NO @ kernel_IO.T, x_IN @ dy_NO


product.defvjp(_forward, _backward)


def dot_general(x: Array, kernel: Array, *_: Any, **__: Any) -> Array:
    """`product` over the last axis of x and the first of the kernel, in the place of `jax.lax.dot_general`."""
    return product(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[1])
