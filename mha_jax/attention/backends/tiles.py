"""A rule as the mask that splash attention asks for, tile by tile, without the T x S square."""

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

from mha_jax.attention.blockmap import FULL, PARTIAL, BlockMap
from mha_jax.attention.regions import Span
from mha_jax.attention.rule import Rule


class TileMask(splash_attention_mask.Mask):
    """One head's mask by its distinct tiles: `index_RC` [rows, columns] points into `tiles_NQK`; tile 0 is empty.

    Equal by content, so that the kernel works heads and layers of equal masks out once.
    """

    def __init__(self, tiles_NQK: np.ndarray, index_RC: np.ndarray):
        self.tiles_NQK, self.index_RC = tiles_NQK, index_RC
        self._hash = hash((tiles_NQK.tobytes(), index_RC.tobytes()))

    @property
    def block(self) -> tuple[int, int]:
        return self.tiles_NQK.shape[1:]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(count * size for count, size in zip(self.index_RC.shape, self.block, strict=True))

    def __getitem__(self, slices: tuple[slice, slice]) -> np.ndarray:
        """The mask of one tile. The kernel asks for no others."""
        row, column = (part.start // size for part, size in zip(slices, self.block, strict=True))
        assert slices == (
            slice(row * self.block[0], (row + 1) * self.block[0]),
            slice(column * self.block[1], (column + 1) * self.block[1]),
        )
        return self.tiles_NQK[self.index_RC[row, column]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TileMask) and all(
            np.array_equal(mine, its)
            for mine, its in ((self.index_RC, other.index_RC), (self.tiles_NQK, other.tiles_NQK))
        )

    def __hash__(self) -> int:
        return self._hash

    def coverage(self, queries: int) -> tuple[np.ndarray, np.ndarray]:
        """Which queries see any key, and which keys, up to the filled length, are seen by any of these queries."""
        sees_NQ, seen_NK = self.tiles_NQK.max(axis=2), self.tiles_NQK.max(axis=1)
        *whole, last = self.index_RC
        in_last_NK = self.tiles_NQK[:, : queries - len(whole) * self.block[0]].max(axis=1)
        seen_CK = np.any([seen_NK[row] for row in whole] + [in_last_NK[last]], axis=0)
        return sees_NQ[self.index_RC].any(axis=1).reshape(-1)[:queries], seen_CK.reshape(-1)


def head_masks(rule: Rule, queries: int, keys: int, block_q: int, block_k: int) -> list[TileMask]:
    """The masks of the heads that a rule tells apart, one where all agree.

    Lengths are filled up to multiples of the blocks: keys beyond the end are invisible, of queries beyond it the answer
    is any. Only tiles of which the rule's bounds do not say enough are worked out.

    Args: rule: without traced leaves, the same for all examples.
    """
    kinds_HRC = BlockMap.of(rule, queries, keys, block_q, block_k).kinds.copy()
    _, rows, columns = kinds_HRC.shape
    if keys % block_k:
        last = kinds_HRC[..., -1]
        last[last == FULL] = PARTIAL
    inside_K = np.arange(columns * block_k) < keys
    partial: dict[tuple[int, int], np.ndarray] = {}
    # Tiles are values even while the program around is traced.
    with jax.ensure_compile_time_eval():
        rule = rule.padded(rows * block_q, columns * block_k)
        for row, column in np.argwhere((kinds_HRC == PARTIAL).any(axis=0)).tolist():
            t, s = Span(row * block_q, block_q), Span(column * block_k, block_k)
            tile_hqk = np.asarray(rule.at(None, None, t, s))[0] & inside_K[s.start :][None, None, :block_k]
            partial[row, column] = np.broadcast_to(tile_hqk, (len(tile_hqk), block_q, block_k))
    heads = max(len(kinds_HRC), *(len(tile_hqk) for tile_hqk in partial.values()), 1)
    return [_mask_of_head(head, kinds_HRC[head % len(kinds_HRC)], partial, (block_q, block_k)) for head in range(heads)]


def _mask_of_head(
    head: int, kinds_RC: np.ndarray, partial: dict[tuple[int, int], np.ndarray], block: tuple[int, int]
) -> TileMask:
    distinct = {np.full(block, value).tobytes(): int(value) for value in (False, True)}
    index_RC = np.where(kinds_RC == FULL, 1, 0)
    for row, column in np.argwhere(kinds_RC == PARTIAL).tolist():
        tile_hqk = partial[row, column]
        index_RC[row, column] = distinct.setdefault(tile_hqk[head % len(tile_hqk)].tobytes(), len(distinct))
    return TileMask(np.stack([np.frombuffer(tile, bool).reshape(block) for tile in distinct]), index_RC)
