"""The step spread over devices: `jit` over a mesh with axes seed, data and head, or `pmap` over data.

Both compile the same pure step and give the same numbers as one device. A program owns the layout: the loop hands it
host batches [R, B, ...] and never sees a sharding.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mha_jax.attention.attend import noting_backends, partitioned
from mha_jax.models.losses import Batch
from mha_jax.specs import RunSpec
from mha_jax.training.step import State, evaluate_step, init_state, peak_bytes, train_step

# Which axis of a parameter is the head axis, counted without the seed axis in front.
_HEAD_AXIS: dict[tuple[str, ...], int] = {
    **dict.fromkeys([("query", "kernel"), ("key", "kernel"), ("value", "kernel")], 1),
    **dict.fromkeys([("query", "bias"), ("key", "bias"), ("value", "bias"), ("out", "kernel")], 0),
}


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
    """One program over a mesh; the compiler inserts the collectives."""

    def __init__(self, run: RunSpec, devices: Sequence[Any]):
        self.run, self.mesh = run, make_mesh(run, devices)
        self.compile_seconds = 0.0
        self.predicted_peak_bytes: int | None = None
        self.attention: list[str] = []  # what each kind of attention runs on, as `noting_backends` tells it
        abstract = jax.eval_shape(functools.partial(init_state, run))
        self._shardings = state_shardings(abstract, self.mesh)
        self._batch_sharding = NamedSharding(self.mesh, PartitionSpec("seed", "data"))
        self._eval_sharding = NamedSharding(self.mesh, PartitionSpec("data"))
        # The compiler may not lay the new state out otherwise: the next step takes it as this one did.
        out = (self._shardings, None)
        self._step = jax.jit(functools.partial(train_step, run), donate_argnums=0, out_shardings=out)
        self._evaluate = jax.jit(functools.partial(evaluate_step, run))
        self._compiled: dict[Any, Any] = {}

    def init(self) -> State:
        # Not compiled as a whole: that takes as long as compiling the step, for a program that runs once.
        return jax.device_put(init_state(self.run), self._shardings)

    def abstract_state(self) -> State:
        abstract = jax.eval_shape(functools.partial(init_state, self.run))
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            self._shardings,
        )

    def load(self, state: State) -> State:
        return jax.device_put(state, self._shardings)

    def unload(self, state: State) -> State:
        return state

    def step(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        batch = jax.device_put(batch, self._batch_sharding)
        return self.compiled_for("step", self._step, state, batch)(state, batch)

    def evaluate(self, params: Any, constants: Any, batch: Batch) -> dict[str, jax.Array]:
        batch = jax.device_put(batch, self._eval_sharding)
        return self.compiled_for("evaluate", self._evaluate, params, constants, batch)(params, constants, batch)

    def spread(self, examples: dict[str, Any]) -> dict[str, Any]:
        """Arrays whose first axis is the examples', split over the data axis where it divides them."""
        rows = next(iter(examples.values())).shape[0]
        return examples if rows % self.mesh.shape["data"] else jax.device_put(examples, self._eval_sharding)

    def _splits(self, name: str) -> bool:
        """Whether the compiler splits the program of this name over devices."""
        return self.mesh.size > 1

    def compiled_for(self, name: str, function: Any, *args: Any) -> Any:
        """The function compiled for these arguments, the last a batch; once a name and shape, and on the clock."""
        key = (name, tuple(sorted((k, v.shape) for k, v in args[-1].items())))
        if key not in self._compiled:
            start = time.perf_counter()
            with partitioned(self._splits(name)), noting_backends() as notes:
                compiled = self._compiled[key] = function.lower(*args).compile()
            self.attention += [note for note in notes if note not in self.attention]
            self.compile_seconds += time.perf_counter() - start
            if name == "step":
                self.predicted_peak_bytes = max(peak_bytes(compiled) or 0, self.predicted_peak_bytes or 0) or None
        return self._compiled[key]


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
            devices=self._devices,
            donate_argnums=0,
        )

    def init(self) -> State:
        return self.load(super().init())

    def _splits(self, name: str) -> bool:
        return super()._splits(name) and name != "step"  # each device has a step of its own

    def load(self, state: State) -> State:
        count = len(self._devices)
        state = jax.tree.map(lambda leaf: np.broadcast_to(np.asarray(leaf)[None], (count, *leaf.shape)), state)
        return jax.device_put(state, self._by_device)

    def unload(self, state: State) -> State:
        return jax.device_put(jax.tree.map(lambda leaf: leaf[0], state), self._shardings)

    def step(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        count = len(self._devices)

        def split(leaf: np.ndarray) -> np.ndarray:
            seeds, examples = leaf.shape[:2]
            return np.moveaxis(leaf.reshape(seeds, count, examples // count, *leaf.shape[2:]), 1, 0)

        batch = jax.device_put({name: split(np.asarray(leaf)) for name, leaf in batch.items()}, self._by_device)
        state, metrics = self.compiled_for("step", self._step, state, batch)(state, batch)
        return state, jax.tree.map(lambda leaf: leaf[0], metrics)


def make_program(run: RunSpec, devices: Sequence[Any]) -> JitProgram | PmapProgram:
    """The program that `run.parallel` asks for. Raises UserError where batch or heads do not fit the devices."""
    run.check_devices(len(devices))
    return {"jit": JitProgram, "pmap": PmapProgram}[run.parallel](run, devices)
