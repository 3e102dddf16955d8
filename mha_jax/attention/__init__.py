"""Attention whose heads are an axis, and whose visibility is a rule."""

from mha_jax.attention.attend import BACKENDS, attend, choose_backend
from mha_jax.attention.multihead import Gate, MultiHeadAttention
from mha_jax.attention.visibility import (
    Causal,
    Dense,
    Full,
    Global,
    Padding,
    PerHead,
    Rule,
    Segments,
    SlidingWindow,
)

__all__ = [
    "BACKENDS",
    "Causal",
    "Dense",
    "Full",
    "Gate",
    "Global",
    "MultiHeadAttention",
    "Padding",
    "PerHead",
    "Rule",
    "Segments",
    "SlidingWindow",
    "attend",
    "choose_backend",
]
