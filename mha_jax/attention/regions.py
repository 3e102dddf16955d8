"""Parts of the query x key square: what a rule is asked about, and what it can say before anything runs."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int


class Span(NamedTuple):
    """`size` neighbouring indices from `start` on; `start` may be traced."""

    start: Any
    size: int

    @property
    def index(self) -> Int[Array, "size"]:
        return self.start + jnp.arange(self.size)

    def of(self, array: Array, axis: int) -> Array:
        """This span of an axis, or the axis itself where it is 1 long: what does not vary is the same everywhere."""
        if array.shape[axis] == 1:
            return array
        return lax.dynamic_slice_in_dim(array, self.start, self.size, axis)


class Bounds(NamedTuple):
    """What is surely so in each of many rectangles, [h, *shape]; h is 1 where all heads agree.

    `some` False: nothing in it is visible. `every` True: all of it is. In between, only `Rule.at` knows.
    """

    some: np.ndarray
    every: np.ndarray


class Rectangles(NamedTuple):
    """Rectangles of the square by their first and last positions, which are in them; the four broadcast together."""

    first_t: np.ndarray
    last_t: np.ndarray
    first_s: np.ndarray
    last_s: np.ndarray

    @classmethod
    def tiling(cls, query_length: int, key_length: int, block_q: int, block_k: int) -> "Rectangles":
        """The tiles of a T x S square; those at the far edges may be smaller."""
        t, s = np.arange(0, query_length, block_q)[:, None], np.arange(0, key_length, block_k)[None, :]
        last_t, last_s = np.minimum(t + block_q, query_length) - 1, np.minimum(s + block_k, key_length) - 1
        return cls(t, last_t, s, last_s)

    @property
    def shape(self) -> tuple[int, ...]:
        return np.broadcast_shapes(*(x.shape for x in self))

    @property
    def offsets(self) -> tuple[np.ndarray, np.ndarray]:
        """The least and the greatest s - t in each."""
        return self.first_s - self.last_t, self.last_s - self.first_t

    def bounds(self, some: Any, every: Any) -> Bounds:
        """Bounds that all heads share."""
        return Bounds(*(np.broadcast_to(np.asarray(x, bool), self.shape)[None] for x in (some, every)))

    def unknown(self) -> Bounds:
        return self.bounds(True, False)


def multiple_within(low: np.ndarray, high: np.ndarray, step: int) -> np.ndarray:
    """Whether a multiple of `step` lies in low..high, ends included."""
    return high // step * step >= low
