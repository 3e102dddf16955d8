"""Attention and its gradients by their definition, in NumPy and float64: what every backend is held against."""

from typing import Any

import numpy as np


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    cotangent: np.ndarray,
    visible: np.ndarray,
    groups: tuple[int, ...],
    scale: float,
    gate: np.ndarray | None = None,
    keep: np.ndarray | None = None,
    dropout_rate: float = 0.0,
) -> dict[str, np.ndarray]:
    """Output "o" and the gradients of sum(o * cotangent) for "q", "k", "v" and "gate" [B, T, H].

    visible: broadcasts to [B, H, T, S]; keep: [B, H, T, S], what dropout keeps.
    """
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    k_BSHK, v_BSHV = k[:, :, list(groups)], v[:, :, list(groups)]
    logits = np.einsum("bthk,bshk->bhts", q, k_BSHK) * scale
    visible = np.broadcast_to(visible, logits.shape)
    top = np.max(logits, axis=-1, keepdims=True, where=visible, initial=-1e300)
    powers = np.exp(np.where(visible, logits - top, -np.inf))
    total = powers.sum(-1, keepdims=True)
    weights = powers / np.where(total > 0, total, 1)
    factor = 1.0 if keep is None else keep / (1 - dropout_rate)
    gate_BTH = np.ones(q.shape[:3]) if gate is None else np.broadcast_to(np.asarray(gate, np.float64), q.shape[:3])
    o = np.einsum("bhts,bshv->bthv", weights * factor, v_BSHV)
    do = cotangent * gate_BTH[..., None]
    dweights = np.einsum("bthv,bshv->bhts", do, v_BSHV) * factor
    dlogits = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) * scale
    return {
        "o": o * gate_BTH[..., None],
        "q": np.einsum("bhts,bshk->bthk", dlogits, k_BSHK),
        "k": by_group(np.einsum("bhts,bthk->bshk", dlogits, q), groups, k.shape[2]),
        "v": by_group(np.einsum("bhts,bthv->bshv", weights * factor, do), groups, v.shape[2]),
        "gate": (cotangent * o).sum(-1),
    }


def by_group(x_BSHX: np.ndarray, groups: tuple[int, ...], num_groups: int) -> np.ndarray:
    """Sums over the heads of each group."""
    summed = np.zeros((*x_BSHX.shape[:2], num_groups, x_BSHX.shape[3]))
    for head, group in enumerate(groups):
        summed[:, :, group] += x_BSHX[:, :, head]
    return summed


def worst(found: dict[str, Any], expected: dict[str, np.ndarray]) -> float:
    """The greatest error, as a share of the greatest magnitude of each array (of 1 where it is less)."""
    return max(
        float(np.max(np.abs(np.asarray(value, np.float64) - expected[name]), initial=0))
        / max(1.0, float(np.max(np.abs(expected[name]), initial=0)))
        for name, value in found.items()
    )
