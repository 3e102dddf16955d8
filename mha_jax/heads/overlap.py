"""Which directions of the residual stream heads read and write, from their weights alone."""

from collections.abc import Callable

import numpy as np

from mha_jax.attention import MultiHeadAttention
from mha_jax.heads.capture import attentions, kind_of
from mha_jax.models.transformer import Model
from mha_jax.specs import UserError

# Singular values below this share of the greatest count as none.
_RANK = 1e-6


def weight_overlap(kind: str, model: Model, other: Model | None = None) -> np.ndarray:
    """How far the maps W_V W_O of two heads read the same and write the same subspace: float64 [N, M], from 0 to 1.

      overlap = |R_a^T R_b|^2 / r  *  |S_a^T S_b|^2 / s      (Frobenius norms)

    R is an orthonormal basis of the columns of W_V, S one of the rows of W_O, r and s the smaller number of
    directions of the two heads: each factor is the mean squared cosine of the principal angles between two subspaces
    (Björck & Golub 1973). W_V A and A^-1 W_O give the same, for any invertible A. Between models that were trained
    from different starts the streams have different bases, and the overlap is chance: about r s / D^2.

    Raises: UserError where the two models' streams have different widths.
    """
    rows = _layers(kind, model)
    columns = rows if other is None else _layers(kind, other)
    widths = [[(layer.memory_dim, layer.d_model) for layer in side] for side in (rows, columns)]
    if widths[0][0] != widths[1][0]:
        raise UserError(
            f"weights read and write spaces of {widths[0][0]} in one model and of {widths[1][0]} in the other; "
            "measure='weights' compares models of one d_model"
        )
    read, write = ([_subspaces(side, part) for side in (rows, columns)] for part in (_value, _out))
    return _mean_squared_cosine(*read) * _mean_squared_cosine(*write)


def _layers(kind: str, model: Model) -> list[MultiHeadAttention]:
    return [layer for name, layer in attentions(model).items() if kind_of(name) == kind and layer.shape.num_heads]


def _value(layer: MultiHeadAttention) -> np.ndarray:
    """[H, M, V]: what each head reads of the memory."""
    kernel_GMV = np.asarray(layer.value.kernel[...], np.float64).swapaxes(0, 1)
    return kernel_GMV[np.asarray(layer.shape.groups, int)]


def _out(layer: MultiHeadAttention) -> np.ndarray:
    """[H, D, V]: where each head writes."""
    return np.asarray(layer.out.kernel[...], np.float64).swapaxes(1, 2)


def _subspaces(layers: list[MultiHeadAttention], part: Callable[[MultiHeadAttention], np.ndarray]) -> list[np.ndarray]:
    """An orthonormal basis [D, r] of the columns of each head's matrix."""
    bases = []
    for layer in layers:
        left_HDV, size_HV, _ = np.linalg.svd(part(layer), full_matrices=False)
        kept_HV = (size_HV > _RANK * size_HV[:, :1]) & (size_HV > 0)
        bases += [left_DV[:, kept_V] for left_DV, kept_V in zip(left_HDV, kept_HV, strict=True)]
    return bases


def _mean_squared_cosine(rows: list[np.ndarray], columns: list[np.ndarray]) -> np.ndarray:
    """[N, M]; 0 with a subspace of no direction. One row at a time: V x (M V) cosines are held."""
    ranks_M = np.array([basis.shape[1] for basis in columns])
    every = np.concatenate(columns, axis=1)
    starts_M = np.concatenate([[0], np.cumsum(ranks_M)])
    found = []
    for basis in rows:
        squares = np.concatenate([[0.0], np.cumsum(np.sum((basis.T @ every) ** 2, axis=0))])
        least_M = np.minimum(basis.shape[1], ranks_M)
        found.append(np.diff(squares[starts_M]) / np.maximum(least_M, 1))
    return np.array(found)
