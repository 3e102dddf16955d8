"""What attention was asked for, without the arrays: all that a backend decides by."""

import dataclasses
from typing import Any

from mha_jax.attention.rule import Rule


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """Sizes are in the letters of `mha_jax.attention.multihead`; `groups` holds the group that each head reads.

    `partitioned` tells that the compiler is to split the program over several devices, which it cannot do with kernels
    that are written by hand.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    groups: tuple[int, ...]
    num_groups: int
    qk_dim: int
    v_dim: int
    dtype: Any
    rule: Rule
    dropout_rate: float
    partitioned: bool = False

    @property
    def regular(self) -> bool:
        """Whether G divides H and neighbouring heads share a group."""
        return self.groups == regular_groups(self.heads, self.num_groups)


def regular_groups(heads: int, num_groups: int) -> tuple[int, ...] | None:
    """The map in which neighbouring heads share a group; None where G does not divide H."""
    if not num_groups or heads % num_groups:
        return None
    return tuple(h // (heads // num_groups) for h in range(heads))
