"""The heads of one attention layer."""

import dataclasses

from mha_jax.specs.checks import UserError, at_least, divisors, listing


@dataclasses.dataclass(frozen=True)
class HeadShape:
    """The heads of one attention layer: H query heads over G key/value heads, K and V wide."""

    num_heads: int
    num_kv_heads: int
    qk_dim: int
    v_dim: int
    head_to_group: tuple[int, ...] | None = None

    @classmethod
    def resolve(
        cls,
        d_model: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        head_to_group: tuple[int, ...] | None = None,
    ) -> "HeadShape":
        """Fills in what is left out: G = H, and d_model / H for each width that is not given.

        Raises: UserError for a width that must be derived where H does not divide d_model (with the head counts
        that fit), G that does not divide H without a map, a map that does not fit, dimensions that are not positive.
        """
        at_least("d_model", d_model, 1)
        at_least("num_heads", num_heads, 0)
        groups = num_heads if num_kv_heads is None else num_kv_heads
        at_least("num_kv_heads", groups, 1 if num_heads else 0)
        for field, width in (("qk_dim", qk_dim), ("v_dim", v_dim)):
            if width is not None:
                at_least(field, width, 1)
            elif num_heads and d_model % num_heads:
                raise UserError(
                    f"d_model={d_model} is not a multiple of num_heads={num_heads}; "
                    f"{listing(divisors(d_model))} fit, or give qk_dim and v_dim"
                )
        derived = d_model // max(num_heads, 1)
        shape = cls(num_heads, groups, qk_dim or derived, v_dim or derived, head_to_group)
        shape._check_groups()
        return shape

    def _check_groups(self) -> None:
        if self.head_to_group is None:
            if self.num_heads and self.num_heads % self.num_kv_heads:
                raise UserError(
                    f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                    f"{listing(divisors(self.num_heads))} fit, or give head_to_group"
                )
            return
        if len(self.head_to_group) != self.num_heads:
            raise UserError(
                f"head_to_group has {len(self.head_to_group)} entries; num_heads={self.num_heads} needs one a head"
            )
        if any(type(g) is not int for g in self.head_to_group):
            raise UserError(f"head_to_group={self.head_to_group!r} must be integers, the number of a group a head")
        outside = [g for g in self.head_to_group if not 0 <= g < self.num_kv_heads]
        if outside:
            raise UserError(
                f"head_to_group names group {outside[0]}; num_kv_heads={self.num_kv_heads} has groups "
                f"0 to {self.num_kv_heads - 1}"
            )

    @property
    def groups(self) -> tuple[int, ...]:
        """The group that each head reads."""
        if self.head_to_group is not None:
            return self.head_to_group
        per_group = self.num_heads // self.num_kv_heads if self.num_heads else 1
        return tuple(h // per_group for h in range(self.num_heads))
