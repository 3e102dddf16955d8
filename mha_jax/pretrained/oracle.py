"""What the forward passes in NumPy share: float64, one row, no batch, written apart from our models."""

from collections.abc import Callable

import numpy as np
from scipy.special import erf

from mha_jax.specs import HeadShape

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu_exact": lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2))),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


def attended(
    q_TX: np.ndarray, k_TX: np.ndarray, v_TX: np.ndarray, heads: HeadShape, visible_TT: np.ndarray
) -> np.ndarray:
    """What the heads read [T, H * V], one head after the other (Vaswani et al. 2017, eq. 1)."""
    read = [np.zeros((len(q_TX), 0))]
    for head, group in enumerate(heads.groups):
        wide, long = heads.qk_dim, heads.v_dim
        q, k = q_TX[:, head * wide : (head + 1) * wide], k_TX[:, group * wide : (group + 1) * wide]
        scores = np.where(visible_TT, q @ k.T / np.sqrt(wide), -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        read.append(weights / weights.sum(axis=-1, keepdims=True) @ v_TX[:, group * long : (group + 1) * long])
    return np.concatenate(read, axis=-1)
