"""The step spread over devices: `jit` over a mesh with axes seed, data and head, or `pmap` over data.

Both compile the same pure step and give the same numbers as one device. A program owns the layout: the loop hands it
host batches [R, B, ...] and never sees a sharding. Over several processes each hands in the rows of its own devices,
`share` of every batch; what comes back to be read on the host is then whole on every process.
"""

import functools
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mha_jax.attention.attend import fell_back, noting_backends, partitioned
from mha_jax.data import Share, batch_shapes
from mha_jax.models.losses import Batch
from mha_jax.specs import RunSpec, UserError
from mha_jax.specs.checks import divisors, listing
from mha_jax.training import hosts
from mha_jax.training.optimizers import Hyperparameters, hyperparameters
from mha_jax.training.step import State, abstract_batches, evaluate_step, init_state, peak_bytes, train_step

# Which axis of a parameter is the head axis, counted without the seed axis in front.
_HEAD_AXIS: dict[tuple[str, ...], int] = {
    **dict.fromkeys([("query", "kernel"), ("key", "kernel"), ("value", "kernel")], 1),
    **dict.fromkeys([("query", "bias"), ("key", "bias"), ("value", "bias"), ("out", "kernel")], 0),
}

# Larger products of one matrix with several are left apart: together they give one array, and attention, whose kernels
# want each of q, k and v whole, would copy it apart again.
_COMPILER_OPTIONS: dict[str, dict[str, str | bool]] = {"gpu": {"xla_gpu_dot_merger_threshold_mb": "16"}}


def make_mesh(run: RunSpec, devices: Sequence[Any]) -> Mesh:
    """The mesh of a run: as many of the devices as its axes need."""
    sizes = run.mesh.sizes(len(devices))
    grid = np.asarray(devices[: int(np.prod(sizes))], dtype=object).reshape(sizes)
    return Mesh(grid, ("seed", "data", "head"), axis_types=(AxisType.Auto,) * 3)


def state_shardings(state: State, mesh: Mesh) -> State:
    """Every leaf split by seed, and by head where it has a head axis (its moments in the optimiser as well)."""

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = tuple(str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path)
        axes: list[str | None] = ["seed"] + [None] * (leaf.ndim - 1)
        by_head = names[-1:] == ("gate",) or names[-2:-1] == ("learned_gate",) or names[:1] == ("importance",)
        head_axis = 0 if by_head else _HEAD_AXIS.get(names[-2:])
        if head_axis is not None:
            axes[1 + head_axis] = "head"
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(sharding, state)


class JitProgram:
    """One program over a mesh; the compiler inserts the collectives.

    It serves every run of the same shape, and several that train together: `run` is one of them.
    """

    def __init__(self, run: RunSpec, devices: Sequence[Any]):
        self.run, self.mesh = run, make_mesh(run, devices)
        self.compile_seconds = 0.0
        self.predicted_peak_bytes: int | None = None
        self.attention: list[str] = []  # what each kind of attention runs on, as `noting_backends` tells it
        abstract = jax.eval_shape(functools.partial(init_state, run))
        self._shardings = state_shardings(abstract, self.mesh)
        self._readable = NamedSharding(self.mesh, PartitionSpec()) if hosts.several() else None
        self._batch_sharding = NamedSharding(self.mesh, PartitionSpec("seed", "data"))
        self._eval_sharding = NamedSharding(self.mesh, PartitionSpec("data"))
        # The compiler may not lay the new state out otherwise: the next step takes it as this one did.
        out = (self._shardings, self._readable)
        self._step = jax.jit(functools.partial(train_step, run), donate_argnums=0, out_shardings=out)
        self._own = hyperparameters([run])
        self._evaluate = self.reading(functools.partial(evaluate_step, run))
        self._compiled: dict[Any, Any] = {}

    def init(self) -> State:
        # Not compiled as a whole: that takes as long as compiling the step, for a program that runs once.
        return _placed(init_state(self.run), self._shardings)

    def abstract_state(self, run: RunSpec | None = None) -> State:
        """Shapes, dtypes and layout of a run's state; default: that of the program's run."""
        abstract = jax.eval_shape(functools.partial(init_state, run or self.run))
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            self._shardings,
        )

    def plan_step(self) -> int | None:
        """Compiles the step of the largest batch and runs nothing; bytes a device that the compiler plans to hold.

        The devices need not be here.
        """
        largest = max(abstract_batches(self.run), key=lambda batch: batch["weights"].size)
        self.compiled_for("step", self._step, *self._abstract_arguments(largest), self._own)
        return self.predicted_peak_bytes

    def _abstract_arguments(self, batch: Batch) -> tuple[State, Batch]:
        return self.abstract_state(), _shapes(batch, self._batch_sharding)

    @functools.cached_property
    def share(self) -> Share:
        """Which rows of every training batch this process has devices for."""
        here = np.vectorize(lambda device: device.process_index == jax.process_index())(self.mesh.devices)
        places = np.flatnonzero(here.any(axis=(0, 2)))
        return Share(int(places[0]), int(places[-1]) + 1, self.mesh.shape["data"])

    def reading(self, function: Any) -> Any:
        """The function, jitted, with results that every process can read."""
        return jax.jit(function, out_shardings=self._readable)

    def load(self, state: State) -> State:
        return _placed(state, self._shardings)

    def unload(self, state: State) -> State:
        return state

    def step(
        self, state: State, batch: Batch, given: Hyperparameters | None = None
    ) -> tuple[State, dict[str, jax.Array]]:
        """`given`: of every member, [R], where several runs train together; default: the program's run's."""
        batch, given = _placed_share(batch, self._batch_sharding, self.share), given or self._own
        return hosts.settled(self.compiled_for("step", self._step, state, batch, given)(state, batch, given))

    def evaluate(self, params: Any, constants: Any, batch: Batch) -> dict[str, jax.Array]:
        batch = _placed(batch, dict.fromkeys(batch, self._eval_sharding))
        sums = self.compiled_for("evaluate", self._evaluate, params, constants, batch)(params, constants, batch)
        hosts.beat()
        return hosts.settled(sums)

    def spread(self, examples: dict[str, Any]) -> dict[str, Any]:
        """Arrays whose first axis is the examples', split over the data axis where it divides them."""
        rows = next(iter(examples.values())).shape[0]
        if rows % self.mesh.shape["data"]:
            return examples
        return _placed(examples, dict.fromkeys(examples, self._eval_sharding))

    def _splits(self, name: str) -> bool:
        """Whether the compiler splits the program of this name over devices."""
        return self.mesh.size > 1

    def compiled_for(self, name: str, function: Any, *args: Any) -> Any:
        """The function compiled for these arguments; once a name and their shapes, and on the clock."""
        told = jax.tree.leaves(args[0])[:1] + jax.tree.leaves(args[1:])  # one of the first tells how many members
        key = (name, *(leaf.shape for leaf in told))
        if key not in self._compiled:
            start = time.perf_counter()
            options = _COMPILER_OPTIONS.get(self.mesh.devices.flat[0].platform)
            with partitioned(self._splits(name)), noting_backends() as notes:
                compiled = self._compiled[key] = function.lower(*args).compile(options)
            hosts.beat()
            self._record([note for note in notes if note not in self.attention])
            self.compile_seconds += time.perf_counter() - start
            if name == "step":
                self.predicted_peak_bytes = max(peak_bytes(compiled) or 0, self.predicted_peak_bytes or 0) or None
        return self._compiled[key]

    def _record(self, attention: list[str]) -> None:
        """What attention runs on; said at once where it is not on what would be quickest."""
        self.attention += attention
        for line in filter(fell_back, attention if hosts.first() else []):
            print(f"note: attention {line}", file=sys.stderr, flush=True)


class PmapProgram(JitProgram):
    """One program a device, data split between them, sums taken by psum. State carries a leading device axis."""

    def __init__(self, run: RunSpec, devices: Sequence[Any]):
        super().__init__(run, devices)
        self._devices = list(self.mesh.devices.flat)
        one_axis = Mesh(np.asarray(self._devices, dtype=object), ("data",), axis_types=(AxisType.Auto,))
        self._by_device = NamedSharding(one_axis, PartitionSpec("data"))
        self._step = jax.pmap(
            functools.partial(train_step, run, axis_name="data"),
            axis_name="data",
            in_axes=(0, 0, None),
            devices=self._devices,
            donate_argnums=0,
        )

    def init(self) -> State:
        return self.load(super().init())

    def _abstract_arguments(self, batch: Batch) -> tuple[State, Batch]:
        count = len(self._devices)
        state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), self.abstract_state())
        rows = {
            name: jax.ShapeDtypeStruct((count, leaf.shape[0], leaf.shape[1] // count, *leaf.shape[2:]), leaf.dtype)
            for name, leaf in batch.items()
        }
        return _shapes(state, self._by_device), _shapes(rows, self._by_device)

    def _splits(self, name: str) -> bool:
        return super()._splits(name) and name != "step"  # each device has a step of its own

    def load(self, state: State) -> State:
        count = len(self._devices)
        state = jax.tree.map(lambda leaf: np.broadcast_to(np.asarray(leaf)[None], (count, *leaf.shape)), state)
        return jax.device_put(state, self._by_device)

    def unload(self, state: State) -> State:
        return jax.device_put(jax.tree.map(lambda leaf: leaf[0], state), self._shardings)

    def step(
        self, state: State, batch: Batch, given: Hyperparameters | None = None
    ) -> tuple[State, dict[str, jax.Array]]:
        count, given = len(self._devices), given or self._own

        def split(leaf: np.ndarray) -> np.ndarray:
            seeds, examples = leaf.shape[:2]
            return np.moveaxis(leaf.reshape(seeds, count, examples // count, *leaf.shape[2:]), 1, 0)

        batch = jax.device_put({name: split(np.asarray(leaf)) for name, leaf in batch.items()}, self._by_device)
        state, metrics = self.compiled_for("step", self._step, state, batch, given)(state, batch, given)
        return state, jax.tree.map(lambda leaf: leaf[0], metrics)


def _shapes(tree: Any, sharding: NamedSharding) -> Any:
    """Shapes that are all laid out alike."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def _placed(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has whole, spread over the devices of all; those that are spread already stay."""
    if not hosts.several():
        return jax.device_put(tree, shardings)

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, tree, shardings)


def _placed_share(batch: Batch, sharding: NamedSharding, share: Share) -> Batch:
    """A batch of whose rows every process has its share, [R, B_here, ...], as one over all devices, [R, B, ...]."""
    if not hosts.several():
        return jax.device_put(batch, sharding)

    def place(leaf: np.ndarray) -> jax.Array:
        seeds, here, *rest = leaf.shape
        rows = here * share.of // (share.end - share.first)
        before = share.rows(rows).start

        def part(index: Any) -> np.ndarray:
            first, end, _ = index[1].indices(rows)
            return leaf[index[0], first - before : end - before]

        return jax.make_array_from_callback((seeds, rows, *rest), sharding, part)

    return {name: place(np.asarray(leaf)) for name, leaf in batch.items()}


def make_program(run: RunSpec, devices: Sequence[Any]) -> JitProgram | PmapProgram:
    """The program that `run.parallel` asks for.

    Raises: UserError where batch or heads do not fit the devices, or the devices of a process would have nothing to do.
    """
    run.check_devices(len(devices))
    _check_rows(run, len(devices))
    if hosts.several():
        _check_processes(run, devices)
    return {"jit": JitProgram, "pmap": PmapProgram}[run.parallel](run, devices)


def _check_rows(run: RunSpec, num_devices: int) -> None:
    data = run.mesh.sizes(num_devices)[1]
    rows = [batch["weights"].shape[0] for batch in batch_shapes(run.data, run.task)]
    common = math.gcd(*rows)
    if common % data:
        raise UserError(
            f"batches of {listing(sorted(set(rows)))} rows do not split over {data} data devices; "
            f"{listing([d for d in divisors(common) if d <= num_devices])} fit"
        )


def _check_processes(run: RunSpec, devices: Sequence[Any]) -> None:
    if run.parallel == "pmap":
        raise UserError("parallel='pmap' runs in one process; over several use parallel='jit'")
    used = int(np.prod(run.mesh.sizes(len(devices))))
    if used != len(devices):
        raise UserError(
            f"mesh seed={run.mesh.seed} x data={run.mesh.data} x head={run.mesh.head} uses {used} of {len(devices)} "
            "devices; over several processes it must use them all: leave mesh.data open, or start fewer"
        )
