"""Attention whose heads are an axis, and whose visibility is a rule."""

from mha_jax.attention.attend import BACKENDS, attend, noting_backends
from mha_jax.attention.multihead import Gate, MultiHeadAttention
from mha_jax.attention.patterns import (
    BigBird,
    BlockDiagonal,
    EveryNth,
    Fixed,
    LogSparse,
    PrefixLM,
    RandomBlocks,
    Strided,
    Summary,
)
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
    "BigBird",
    "BlockDiagonal",
    "Causal",
    "Dense",
    "EveryNth",
    "Fixed",
    "Full",
    "Gate",
    "Global",
    "LogSparse",
    "MultiHeadAttention",
    "Padding",
    "PerHead",
    "PrefixLM",
    "RandomBlocks",
    "Rule",
    "Segments",
    "SlidingWindow",
    "Strided",
    "Summary",
    "attend",
    "noting_backends",
]
