"""Which tiles of the square a kernel has to visit, and what a rule costs by them."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.attention.regions import Rectangles, Span
from mha_jax.attention.rule import Rule, integer
from mha_jax.specs import UserError

EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclasses.dataclass(frozen=True, eq=False)
class BlockMap:
    """What each tile holds: `kinds` [h, rows, columns] of EMPTY, PARTIAL, FULL; h is 1 where all heads agree.

    Tiles are block_q queries high and block_k keys wide. PARTIAL tiles need the mask, FULL ones do not, EMPTY ones are
    left out. A tile of which nothing is known before the run is PARTIAL.
    """

    query_length: int
    key_length: int
    block_q: int
    block_k: int
    kinds: np.ndarray

    @classmethod
    def of(cls, rule: Rule, query_length: int, key_length: int, block_q: int, block_k: int) -> "BlockMap":
        bounds = rule.bounds(Rectangles.tiling(query_length, key_length, block_q, block_k))
        kinds = np.where(bounds.every, FULL, np.where(bounds.some, PARTIAL, EMPTY)).astype(np.uint8)
        if len(kinds) > 1 and (kinds == kinds[:1]).all():
            kinds = kinds[:1]
        return cls(query_length, key_length, block_q, block_k, kinds)

    # By content, so that programs compiled for one map serve all equal ones.
    def _content(self) -> tuple[object, ...]:
        sizes = (self.query_length, self.key_length, self.block_q, self.block_k)
        return *sizes, self.kinds.shape, self.kinds.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockMap) and self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self._content())

    @property
    def paid(self) -> float:
        """The share of the square that lies in tiles which are visited, the mean over heads."""
        where = Rectangles.tiling(self.query_length, self.key_length, self.block_q, self.block_k)
        area = (where.last_t - where.first_t + 1) * (where.last_s - where.first_s + 1)
        return float(((self.kinds != EMPTY) * area).sum() / max(len(self.kinds) * area.sum(), 1))

    def transposed(self) -> "BlockMap":
        """The map as keys see it: rows are tiles of keys."""
        kinds = np.ascontiguousarray(self.kinds.swapaxes(1, 2))
        return BlockMap(self.key_length, self.query_length, self.block_k, self.block_q, kinds)


@dataclasses.dataclass(frozen=True)
class Description:
    """What a rule shows and what it costs at one length; shares are of the whole square, means over heads.

    visible: share that is visible. paid: share in tiles that are visited (`block` x `block`). full, partial: numbers of
    visited tiles that do not and that do need the mask, of all heads that the rule tells apart. picture: one line of
    text a row of tiles, the first head's: █ full, ▒ partial, · empty.
    """

    length: int
    block: int
    visible: float
    paid: float
    full: int
    partial: int
    picture: str

    def __str__(self) -> str:
        head = (
            f"length {self.length}, tiles {self.block} x {self.block}: visible {self.visible:.2%}, paid {self.paid:.2%}"
        )
        return f"{head}, {self.full} full and {self.partial} partial tiles\n{self.picture}"


def describe(rule: Rule, length: int, block: int = 128, width: int = 32) -> Description:
    """What a rule shows of a length x length square, and what a kernel with such tiles pays for it.

    Args: width: columns of the picture at most.
    Raises: UserError for a length or a block below 1, and for a rule that is not for this length, or for no head.
    """
    length, block = integer("length", length, least=1), integer("block", block, least=1)
    rule.check(length, length)
    tiles = BlockMap.of(rule, length, length, block, block)
    if not len(tiles.kinds):
        raise UserError(f"{rule!r} has no head to describe; PerHead takes one rule a head")
    drawn = max(block, -(-length // width))
    picture = BlockMap.of(rule, length, length, drawn, drawn).kinds[0]
    return Description(
        length=length,
        block=block,
        visible=_visible(rule, length),
        paid=tiles.paid,
        full=int((tiles.kinds == FULL).sum()),
        partial=int((tiles.kinds == PARTIAL).sum()),
        picture=_draw(picture),
    )


def _draw(kinds: np.ndarray) -> str:
    return "\n".join("".join("·▒█"[kind] for kind in row) for row in kinds)


def _visible(rule: Rule, length: int) -> float:
    """The visible share, counted band by band so that no more than a few million places are held at once."""
    rows = min(length, max(1, 2**22 // max(length, 1)))
    rule = rule.padded(length + rows, length)

    @functools.partial(jax.jit, static_argnums=1)
    def share(start: jax.Array, size: int) -> jax.Array:
        mask = rule.at(None, None, Span(start, size), Span(0, length))
        return jnp.broadcast_to(mask, (*mask.shape[:2], size, length)).mean(dtype=jnp.float32)

    bands = [(start, min(rows, length - start)) for start in range(0, length, rows)]
    return _mean([float(share(jnp.asarray(start), size)) for start, size in bands], [size for _, size in bands])


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    return float(np.average(values, weights=weights)) if values else 0.0
