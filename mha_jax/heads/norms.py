"""How large the weights of a head are: a measure that reads no data."""

import numpy as np
from jaxtyping import Array

from mha_jax.heads.capture import attentions
from mha_jax.heads.tables import Heads
from mha_jax.models.transformer import Model

NORMS = ("query_norm", "key_norm", "value_norm", "out_norm", "norm")


def weight_norms(model: Model) -> dict[str, Heads]:
    """{measure: {attention: float64 [H]}}: Frobenius norms of each head's slices of the four kernels, without biases.

      query_norm |Q[:,h]|    key_norm |K[:,g(h)]|    value_norm |V[:,g(h)]|    out_norm |gate[h] O[h]|
      norm = sqrt(query_norm^2 + key_norm^2 + value_norm^2 + out_norm^2)

    Heads of one group share its keys and values, and so these norms. A gate scales what the head writes and no other
    part, so it is counted with O: a head whose gate is 0 still has queries, keys and values, but an out_norm of 0.
    """
    found: dict[str, Heads] = {measure: {} for measure in NORMS}
    for name, layer in attentions(model).items():
        groups = np.asarray(layer.shape.groups, int)
        parts_H = (
            _norms(layer.query.kernel[...], 1),
            _norms(layer.key.kernel[...], 1)[groups],
            _norms(layer.value.kernel[...], 1)[groups],
            _norms(layer.out.kernel[...], 0) * np.abs(np.asarray(layer.gate[...], np.float64)),
        )
        for measure, values_H in zip(NORMS, (*parts_H, np.sqrt(sum(part**2 for part in parts_H))), strict=True):
            found[measure][name] = values_H
    return found


def _norms(kernel: Array, axis: int) -> np.ndarray:
    """The norm of each slice along the axis of heads."""
    others = tuple(i for i in range(kernel.ndim) if i != axis)
    return np.sqrt(np.square(np.asarray(kernel, np.float64)).sum(axis=others))
