"""Linear probes of many heads at once: multinomial logistic regression with an L2 penalty, as one batched problem.

For each head h, each set of labels l and each penalty r the mean over words of

  -log softmax(x[h,n] @ kernel[h,:,l,r] + bias[h,l,r])[label[l,n]] + l2[r] / 2 |kernel|^2,   x standardised

is minimised by steps over batches of words, with momentum, preconditioned by the inverse covariance of the features and
the variance of each class: an approximation of Newton's steps whose matrix stays the same (Böhning 1992), so that two
passes over the words are enough. All heads, labels and penalties share each pass.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

_BATCH = 500
# Few words are read more often than `_PASSES` times: until so many steps are taken.
_STEPS, _PASSES = 80, 2
_MOMENTUM = 0.9
# Rows that estimate the covariance, and what is added to it so that a constant feature has an inverse.
_COVARIANCE_ROWS, _RIDGE = 4000, 1e-2


class Probes(NamedTuple):
    """Trained probes, for features that are not standardised: what standardises them is part of the weights."""

    kernel_HVLRC: Float[Array, "H V L R C"]
    bias_HLRC: Float[Array, "H L R C"]

    def logits(self, x_HNV: Float[Array, "H N V"]) -> Float[Array, "H N L R C"]:
        """Scores of every class by every probe."""
        return jnp.einsum("hnv,hvlrc->hnlrc", x_HNV, self.kernel_HVLRC) + self.bias_HLRC[:, None]


@functools.partial(jax.jit, static_argnames=("classes", "passes"))
def train_probes(
    x_HNV: Float[Array, "H N V"],
    labels_LN: Int[Array, "L N"],
    l2_R: Float[Array, " R"],
    *,
    classes: int,
    passes: int = _PASSES,
) -> Probes:
    """Probes of every head, set of labels and penalty; the same arguments give the same probes.

    Args: labels_LN: classes from 0 to classes - 1. passes: over all words, at least; more come closer to the minimum.
    """
    heads, words, width = x_HNV.shape
    batch = min(words, _BATCH)
    steps = max(_STEPS, passes * words // batch)
    mean_H1V, deviation_H1V = x_HNV.mean(axis=1, keepdims=True), x_HNV.std(axis=1, keepdims=True)
    scale_H1V = 1 / jnp.where(deviation_H1V > 0, deviation_H1V, 1)
    order = _order(words, steps * batch)

    def standardised(rows: Array) -> Array:
        return (x_HNV[:, rows] - mean_H1V) * scale_H1V

    some_HNV = standardised(order[: min(words, _COVARIANCE_ROWS)])
    covariance_HVV = jnp.einsum("hnv,hnw->hvw", some_HNV, some_HNV) / some_HNV.shape[1]
    inverse_HVV = jnp.linalg.inv(covariance_HVV + _RIDGE * jnp.eye(width, dtype=x_HNV.dtype)[None])
    share_LC = jnp.stack([jnp.bincount(labels_N, length=classes) for labels_N in labels_LN]) / words
    # A class's curvature is at most its variance, on average over the words; the penalty's is added.
    curvature_LRC = (share_LC * (1 - share_LC) + 1e-3)[:, None] + l2_R[None, :, None] / (10 * _RIDGE)
    penalty = l2_R[None, None, None, :, None]

    def step(carry: tuple[Array, ...], number: Array) -> tuple[tuple[Array, ...], None]:
        kernel, bias, kernel_moved, bias_moved = carry
        rows = lax.dynamic_slice_in_dim(order, number * batch, batch)
        x_HbV = standardised(rows)
        true_bLC = jax.nn.one_hot(labels_LN[:, rows].T, classes, dtype=x_HNV.dtype)
        scores = jnp.einsum("hbv,hvlrc->hblrc", x_HbV, kernel) + bias[:, None]
        error = (jax.nn.softmax(scores, axis=-1) - true_bLC[None, :, :, None, :]) / batch
        slope = jnp.einsum("hbv,hblrc->hvlrc", x_HbV, error) + penalty * kernel
        newton = jnp.einsum("hvw,hwlrc->hvlrc", inverse_HVV, slope) / curvature_LRC[None, None]
        kernel_moved = _MOMENTUM * kernel_moved + (1 - _MOMENTUM) * newton
        bias_moved = _MOMENTUM * bias_moved + (1 - _MOMENTUM) * error.sum(axis=1) / curvature_LRC[None]
        size = 1 - number / steps  # falls to 0, which averages the noise of the batches away
        return (kernel - size * kernel_moved, bias - size * bias_moved, kernel_moved, bias_moved), None

    kernel = jnp.zeros((heads, width, len(labels_LN), len(l2_R), classes), x_HNV.dtype)
    start = jnp.log(jnp.maximum(share_LC, 1 / (2 * words)))[None, :, None, :]
    bias = jnp.broadcast_to(start, (heads, *kernel.shape[2:])).astype(x_HNV.dtype)
    carry = (kernel, bias, jnp.zeros_like(kernel), jnp.zeros_like(bias))
    kernel, bias, _, _ = lax.scan(step, carry, jnp.arange(steps))[0]
    kernel = kernel * scale_H1V[:, 0, :, None, None, None]
    return Probes(kernel, bias - jnp.einsum("hv,hvlrc->hlrc", mean_H1V[:, 0], kernel))


def _order(words: int, count: int) -> Array:
    """So many rows: all words in one random order after the other."""
    keys = jax.random.split(jax.random.key(0), -(-count // words))
    return jax.vmap(lambda key: jax.random.permutation(key, words))(keys).reshape(-1)[:count]
