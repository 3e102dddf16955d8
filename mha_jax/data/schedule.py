"""Which training rows make up the batch of a step: a pure function of (seed, step), whatever was asked for before.

The order of the buckets is the same for every seed, because seeds are stacked on an axis and need one shape a step. The
rows inside them are the seed's own, shuffled anew each epoch. Not grain's shuffle: it adds the epoch to the seed, so
that seed 0 in its second epoch repeats seed 1 in its first, and it costs 15 microseconds a row.
"""

from collections.abc import Sequence

import numpy as np

_CYCLE_STEPS = 1000  # enough steps for bucket shares to be right within a thousandth


class Shuffle:
    """An endless shuffled stream of `count` rows for each seed; the permutations of two epochs are kept."""

    def __init__(self, count: int, salt: int):
        self._count = count
        self._salt = salt
        self._epochs: dict[tuple[int, int], np.ndarray] = {}

    def _permutation(self, seed: int, epoch: int) -> np.ndarray:
        found = self._epochs.get((seed, epoch))
        if found is None:
            found = np.random.default_rng([seed % 2**64, self._salt, epoch]).permutation(self._count)
            self._epochs.pop((seed, epoch - 2), None)
            self._epochs[seed, epoch] = found
        return found

    def take(self, seed: int, start: int, size: int) -> np.ndarray:
        """Entries start to start + size of the seed's stream, across ends of epochs."""
        parts = []
        while size:
            epoch, first = divmod(start, self._count)
            part = self._permutation(seed, epoch)[first : first + size]
            parts.append(part)
            start, size = start + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Schedule:
    """Buckets over steps, each as often as the batches that it holds."""

    def __init__(self, rows: Sequence[np.ndarray], batch_sizes: Sequence[int]):
        self._rows = rows
        self._batch_sizes = batch_sizes
        self._shuffles = [Shuffle(len(r), salt) for salt, r in enumerate(rows)]
        epoch_steps = np.array([len(r) / size for r, size in zip(rows, batch_sizes, strict=True)])
        cycle = epoch_steps * max(_CYCLE_STEPS / epoch_steps.sum(), 1)
        self._per_cycle = np.where(epoch_steps > 0, np.maximum(np.rint(cycle), 1), 0).astype(int)
        buckets = np.repeat(np.arange(len(rows)), self._per_cycle)
        self._order = np.random.default_rng(0).permutation(buckets)
        self._rank = np.zeros(len(buckets), int)  # how often the same bucket came before in the cycle
        for bucket, count in enumerate(self._per_cycle):
            self._rank[self._order == bucket] = np.arange(count)

    def at(self, seed: int, step: int) -> tuple[int, np.ndarray]:
        """The bucket of a step, the same for all seeds, and the rows that the seed takes from it."""
        cycle, place = divmod(step, len(self._order))
        bucket = int(self._order[place])
        size = self._batch_sizes[bucket]
        nth = cycle * int(self._per_cycle[bucket]) + int(self._rank[place])
        return bucket, self._rows[bucket][self._shuffles[bucket].take(seed, nth * size, size)]
