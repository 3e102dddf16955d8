"""Which cells of a sweep train together in one program: those of one shape, as many as fit and as pays."""

import dataclasses
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mha_jax import config as configs
from mha_jax.specs import RunSpec
from mha_jax.sweeps.store import RunDirectory
from mha_jax.training import hosts

_MEMORY_SHARE = 0.8  # of a device's memory, as evaluation and the allocator want some too
_LONG = 5e12  # FLOPs that a core of a CPU works off in about two minutes


def packs(directories: Sequence[RunDirectory], *, workers: int, devices: Mapping[str, Any]) -> list[list[RunDirectory]]:
    """The directories in packs, for an executor that runs `workers` packs at once.

    Cells go together if they differ only in seeds, learning rate and weight decay and stand at the same checkpoint. Of
    every shape there are so few packs as leave none with more than

      pack   members (cells times their seeds), where config.pack is a number: 1 packs nothing;
      N / workers cells of the N that are not done, so that no worker is idle;
      what fits, with pack="auto": `estimated_peak_bytes` of all in 0.8 of the memory that a worker has.

    With "auto" a CPU packs short cells only, whose start-up and compilation cost as much as their training: its members
    take turns, so that nothing else is won, and long cells had better end one by one. Accelerators pack all.

    Cells that several processes train together go one by one.

    Args: devices: "platform", "count" and "memory" (bytes a device, None where unknown: then "auto" packs nothing).
    """
    if hosts.several():
        return [[directory] for directory in directories]
    made = [[directory] for directory in directories if directory.state == "done"]
    waiting = [directory for directory in directories if directory.state != "done"]
    fair = math.ceil(len(waiting) / workers)
    groups: dict[str, list[tuple[RunDirectory, RunSpec]]] = {}
    for directory in waiting:
        run = configs.resolve(directory.config)
        groups.setdefault(repr((_shape(run), _checkpoint(directory))), []).append((directory, run))
    for group in groups.values():
        largest = max((run for _, run in group), key=lambda run: len(run.seeds))
        most = _most(largest, fair, workers, devices) if len(group) > 1 else 1
        made += _even([directory for directory, _ in group], math.ceil(len(group) / max(most, 1)))
    order = {directory.run_id: place for place, directory in enumerate(directories)}
    return sorted(made, key=lambda pack: order[pack[0].run_id])


def _shape(run: RunSpec) -> RunSpec:
    """The run without what its program takes as arguments."""
    optimizer = dataclasses.replace(run.optimizer, learning_rate=1.0, weight_decay=0.0)
    return dataclasses.replace(run, name="", seeds=tuple(range(run.mesh.seed)), optimizer=optimizer)


def _checkpoint(directory: RunDirectory) -> int:
    """The newest step that is saved, as far as names tell; 0 where there is none."""
    folder = directory.path / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _most(run: RunSpec, fair: int, workers: int, devices: Mapping[str, Any]) -> int:
    """How many cells like this one a pack may have, `fair` at most."""
    if run.pack != "auto":
        return min(fair, int(run.pack) // len(run.seeds))
    from mha_jax.training import estimates  # flax takes seconds to import: only where cells may be packed

    platform, count = devices["platform"], devices["count"]
    if platform == "cpu" and estimates.step_flops(run) * run.training.steps > _LONG:
        return 1
    memory = _machine_memory() if platform == "cpu" else devices.get("memory") or 0

    def fits(cells: int) -> bool:
        together = dataclasses.replace(run, seeds=tuple(range(cells * len(run.seeds))))
        return estimates.estimated_peak_bytes(together, count, platform) * workers <= _MEMORY_SHARE * memory

    return max((cells for cells in range(1, fair + 1) if fits(cells)), default=1)


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _even(group: list[RunDirectory], count: int) -> list[list[RunDirectory]]:
    """So many parts of a list, in order, whose lengths differ by one at most."""
    ends = [len(group) * part // count for part in range(count + 1)]
    return [group[start:end] for start, end in itertools.pairwise(ends)]
