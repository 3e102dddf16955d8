"""Where each tensor of another library's checkpoint stands in our trees, read both ways.

Theirs are matrices, ours keep the head axis. Written as a matrix [inputs, outputs], a kernel [D, H, K] is the same as
theirs, transposed where theirs is [outputs, inputs] (torch.nn.Linear). Heads that lie side by side there do so here.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mha_jax.pretrained.directory import Tensors
from mha_jax.specs import HeadShape, UserError

Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """One of our arrays. `contracted` of its axes are inputs; with `halves` a head's features are theirs reordered.

    Halves: theirs rotates feature i with feature i + K/2, ours (attention.rotary) with its neighbour.
    """

    path: Path
    shape: tuple[int, ...]
    contracted: int = 1
    halves: bool = False

    @property
    def matrix(self) -> tuple[int, ...]:
        """Its shape as [inputs, outputs]; a vector's where all axes are outputs."""
        inner, outer = self.shape[: self.contracted], self.shape[self.contracted :]
        return (math.prod(inner), math.prod(outer)) if inner else (math.prod(outer),)

    def ours(self, matrix: np.ndarray) -> np.ndarray:
        if self.halves:
            split = matrix.reshape(*self.shape[:-1], 2, self.shape[-1] // 2)
            matrix = np.swapaxes(split, -1, -2)
        return matrix.reshape(self.shape)

    def theirs(self, array: np.ndarray) -> np.ndarray:
        if self.halves:
            array = np.swapaxes(array.reshape(*self.shape[:-1], self.shape[-1] // 2, 2), -1, -2)
        return array.reshape(self.matrix)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor of theirs: our arrays side by side along its outputs; [outputs, inputs] with `transposed`."""

    name: str
    places: tuple[Place, ...]
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        *inputs, _ = self.places[0].matrix
        shape = (*inputs, sum(place.matrix[-1] for place in self.places))
        return shape[::-1] if self.transposed else shape


def entry(name: str, path: Path, *shape: int) -> Entry:
    """A tensor that is one of our arrays as it stands."""
    return Entry(name, (Place(path, shape, len(shape) - 1),))


def norm(name: str, path: Path, width: int, *, bias: bool = True) -> list[Entry]:
    """The gain of a norm, and what it adds."""
    found = [entry(f"{name}.weight", (*path, "scale"), width)]
    return found + ([entry(f"{name}.bias", (*path, "bias"), width)] if bias else [])


def linear(
    name: str, path: Path, inputs: int, outputs: int, *, bias: bool = True, transposed: bool = True
) -> list[Entry]:
    """A linear layer without heads."""
    found = [Entry(f"{name}.weight", (Place((*path, "kernel"), (inputs, outputs)),), transposed)]
    return found + ([entry(f"{name}.bias", (*path, "bias"), outputs)] if bias else [])


def into_heads(
    names: Sequence[str],
    path: Path,
    width: int,
    heads: HeadShape,
    *,
    bias: bool,
    transposed: bool,
    halves: bool = False,
) -> list[Entry]:
    """Queries, keys and values: a tensor for each of three `names`, or all in one."""
    sizes = {
        "query": (heads.num_heads, heads.qk_dim),
        "key": (heads.num_kv_heads, heads.qk_dim),
        "value": (heads.num_kv_heads, heads.v_dim),
    }
    parts = {part: (size, halves and part != "value") for part, size in sizes.items()}
    kernels = [Place((*path, part, "kernel"), (width, *size), 1, half) for part, (size, half) in parts.items()]
    biases = [Place((*path, part, "bias"), size, 0, half) for part, (size, half) in parts.items()]
    groups = [slice(0, 3)] if len(names) == 1 else [slice(number, number + 1) for number in range(3)]
    found = []
    for name, group in zip(names, groups, strict=True):
        found.append(Entry(f"{name}.weight", tuple(kernels[group]), transposed))
        found += [Entry(f"{name}.bias", tuple(biases[group]))] if bias else []
    return found


def out_of_heads(name: str, path: Path, width: int, heads: HeadShape, *, bias: bool, transposed: bool) -> list[Entry]:
    """The product that adds up what heads write."""
    kernel = Place((*path, "out", "kernel"), (heads.num_heads, heads.v_dim, width), 2)
    found = [Entry(f"{name}.weight", (kernel,), transposed)]
    return found + ([entry(f"{name}.bias", (*path, "out", "bias"), width)] if bias else [])


def to_ours(entries: Iterable[Entry], tensors: Tensors, where: str) -> dict[str, Any]:
    """The tree of our arrays, float32.

    Raises: UserError with one line that lists the tensors that are missing, those that nothing reads, or a wrong shape.
    """
    wanted = {one.name: one for one in entries}
    missing, extra = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    if missing or extra:
        raise UserError(
            f"{where} does not hold the tensors of its config.json"
            + (f"; missing: {', '.join(sorted(missing))}" if missing else "")
            + (f"; not known: {', '.join(sorted(extra))}" if extra else "")
        )
    tree: dict[str, Any] = {}
    for name, one in wanted.items():
        if tensors[name].shape != one.shape:
            raise UserError(
                f"{where}: {name} is {list(tensors[name].shape)}; by its config.json it is {list(one.shape)}"
            )
        matrix = tensors[name].T if one.transposed else tensors[name]
        ends = np.cumsum([place.matrix[-1] for place in one.places])[:-1]
        for place, part in zip(one.places, np.split(matrix, ends, axis=-1), strict=True):
            _put(tree, place.path, np.ascontiguousarray(place.ours(part), np.float32))
    return tree


def to_theirs(entries: Iterable[Entry], params: Any) -> Tensors:
    """The tensors of theirs out of our tree."""
    tensors = {}
    for one in entries:
        parts = [place.theirs(np.asarray(_at(params, place.path))) for place in one.places]
        matrix = np.concatenate(parts, axis=-1)
        tensors[one.name] = matrix.T if one.transposed else matrix
    return tensors


def _put(tree: dict[Any, Any], path: Path, leaf: np.ndarray) -> None:
    for step in path[:-1]:
        tree = tree.setdefault(step, {})
    tree[path[-1]] = leaf


def _at(tree: Any, path: Path) -> Any:
    for step in path:
        tree = tree[step]
    return tree
