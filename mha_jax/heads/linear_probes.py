"""Linear probes of many heads at once: multinomial logistic regression with an L2 penalty, as one batched problem.

For each head h, each set of labels l and each penalty r the mean over words of

  -log softmax(x[h,n] @ kernel[h,:,l,r] + bias[h,l,r])[label[l,n]] + l2[r] / 2 |kernel|^2,   x standardised

is minimised by steps over batches of words, with momentum, preconditioned by the inverse covariance of the features and
the variance of each class: an approximation of Newton's steps whose matrix stays the same (Böhning 1992), so that two
passes over the words are enough. All labels and penalties share each pass; heads go by the dozen, whose words and
weights stay in a processor's cache.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

_BATCH, _HEADS = 500, 12
# Few words are read more often than `_PASSES` times: until so many steps are taken.
_STEPS, _PASSES = 80, 2
# The first step is this part of Newton's: with a whole one, rare classes would follow the noise of the batches.
_SIZE, _MOMENTUM = 0.25, 0.8
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

    Of more than 500 words one in 500 may be left out, which makes all batches alike.

    Args: labels_LN: classes from 0 to classes - 1. passes: over all words, at least; more come closer to the minimum.
    """
    sets, words = labels_LN.shape
    batches = max(1, words // _BATCH)
    rows = words // batches
    share_LC = jnp.stack([jnp.bincount(label_N, length=classes) for label_N in labels_LN]) / words
    share_LC = share_LC.clip(1 / (2 * words), 1 - 1 / (2 * words))  # a class that is not there may yet come
    shape = (sets, len(l2_R), classes)

    def outputs(x: Array) -> Array:
        """A number of each of the O = L R C outputs of a head, [1, O]."""
        return jnp.broadcast_to(x, shape).reshape(1, -1)

    l2_1O = outputs(l2_R[None, :, None])
    # A class's curvature is at most its variance, on average over the words. The penalty's is added, times what the
    # inverse makes of it where features hardly vary: a tenth of that, which momentum bears.
    curvature_1O = outputs((share_LC * (1 - share_LC))[:, None]) + 1e-3 + l2_1O / (10 * _RIDGE)
    start_1O = outputs(jnp.log(share_LC)[:, None])
    # Batch s has the words s, s + S, s + 2 S, ...: of every part of the text, and read in strides, not gathered.
    labels_SbL = labels_LN[:, : rows * batches].reshape(sets, rows, batches).transpose(2, 1, 0)
    steps = max(_STEPS, passes * batches)
    first = _SIZE if batches > 1 else 1.0

    def of_head(x_NV: Array) -> tuple[Array, Array]:
        x_bSV = x_NV[: rows * batches].reshape(rows, batches, -1)
        mean_1V, variance_V = x_NV.mean(axis=0, keepdims=True), x_NV.var(axis=0)
        variance_V = jnp.where(variance_V > 0, variance_V, 1)
        some_NV = x_bSV[:, : -(-_COVARIANCE_ROWS // rows)].reshape(-1, x_NV.shape[1]) - mean_1V
        covariance_VV = some_NV.T @ some_NV / len(some_NV)
        inverse_VV = jnp.linalg.inv(covariance_VV + _RIDGE * jnp.diag(variance_V))
        # Weights are of the features as they are; those of standardised ones are times the deviation.
        penalty_VO = variance_V[:, None] * l2_1O

        def step(carry: tuple[Array, ...], number: Array) -> tuple[tuple[Array, ...], None]:
            kernel, bias, kernel_moved, bias_moved = carry
            x_bV = lax.dynamic_index_in_dim(x_bSV, number % batches, axis=1, keepdims=False)
            true_bLC = jax.nn.one_hot(labels_SbL[number % batches], classes, dtype=x_NV.dtype)
            scores = (x_bV @ kernel + (bias - mean_1V @ kernel)).reshape(rows, *shape)
            error_bO = (jax.nn.softmax(scores, axis=-1) - true_bLC[:, :, None, :]).reshape(rows, -1) / rows
            total_1O = error_bO.sum(axis=0, keepdims=True)
            slope = (error_bO.T @ x_bV).T - mean_1V.T * total_1O + penalty_VO * kernel
            kernel_moved = _MOMENTUM * kernel_moved + (1 - _MOMENTUM) * (inverse_VV @ slope) / curvature_1O
            bias_moved = _MOMENTUM * bias_moved + (1 - _MOMENTUM) * total_1O / curvature_1O
            size = first * (1 - number / steps)  # falls to 0, which averages the noise of the batches away
            return (kernel - size * kernel_moved, bias - size * bias_moved, kernel_moved, bias_moved), None

        kernel = jnp.zeros((x_NV.shape[1], len(l2_1O[0])), x_NV.dtype)
        start = (kernel, start_1O.astype(x_NV.dtype), kernel, jnp.zeros_like(start_1O, x_NV.dtype))
        kernel, bias, _, _ = lax.scan(step, start, jnp.arange(steps))[0]
        return kernel.reshape(-1, *shape), (bias - mean_1V @ kernel).reshape(shape)

    return Probes(*lax.map(of_head, x_HNV, batch_size=_HEADS))
