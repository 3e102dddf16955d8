"""Checkpoints of a run: saved by Orbax in the background, sealed by a manifest, verified before they are read.

`checkpoints/<step>/` holds one step: Orbax's files and our `manifest.json`. A step without a true manifest does not
count: it is named and the one before is used. Orbax alone restores flipped bytes and other dtypes without a word.
"""

import concurrent.futures
import dataclasses
import math
from typing import Any, Literal

import jax
import numpy as np
from etils import epath

from mha_jax.specs import UserError
from mha_jax.storage import refusal
from mha_jax.training import hosts, manifests

_UNFINISHED = "orbax-checkpoint-tmp"


@dataclasses.dataclass(frozen=True)
class Restored:
    """One step as it was saved."""

    step: int
    state: Any
    metadata: dict[str, Any]


class Checkpoints:
    """The saved steps of one run: the newest `keep_last`, and the best by metric.

    One process writes to a directory at a time (in a multi-host run, its processes together); any number may read.
    `problems` says after `restore` which steps were passed over, and why.
    """

    def __init__(self, directory: epath.PathLike, keep_last: int, metric_mode: Literal["min", "max"] = "min") -> None:
        self.directory = epath.Path(directory).absolute() if "://" not in str(directory) else epath.Path(directory)
        self.problems: list[str] = []
        self._keep_last = keep_last
        self._metric_mode = metric_mode
        self._damaged: set[int] = set()
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, concurrent.futures.Future[None]] | None = None
        self._orbax: Any = None

    def save(self, step: int, state: Any, metadata: dict[str, Any], metric: float | None = None) -> None:
        """Copies the state and returns; writing, sealing and removing older steps go on in the background.

        Args:    state: pytree of arrays (no typed keys); may be donated as soon as this returns.
                 metadata: anything JSON holds.
                 metric: decides which step is the best; one that is not finite never does.
        Raises:  what the save before this one failed with, as `wait` does.
        """
        self.wait()
        self._damaged.discard(step)
        named = _named_leaves(state)
        facts = {
            "step": int(step),
            "metric": None if metric is None or not math.isfinite(metric) else float(metric),
            "metadata": metadata,
            "arrays": {name: _described(leaf) for name, leaf in named.items()},
        }
        import orbax.checkpoint as ocp  # here, as most importers of this module never save

        try:
            arguments = ocp.args.StandardSave(_stored(named))  # pyright: ignore[reportCallIssue]
            self._checkpointer().save(self._path(step), args=arguments, force=True)
        except Exception as error:
            self._raise_if_refused(step, error)
            raise
        self._saving = (step, self._worker.submit(self._finish, step, facts))

    def wait(self) -> None:
        """Returns when nothing is being saved any more, by any of the run's processes.

        Raises: what saving failed with; UserError where the disk is full or read-only, naming the last good step.
        """
        if self._saving is None:
            return
        (step, future), self._saving = self._saving, None
        try:
            future.result()
        except Exception as error:
            self._raise_if_refused(step, error)
            raise
        hosts.barrier(f"checkpoint {step}")  # the first process has sealed it

    def close(self) -> None:
        """Waits like `wait`, then lets go of the threads."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            if self._orbax is not None:
                self._orbax.close()
                self._orbax = None

    def steps(self) -> list[int]:
        """The sealed steps, rising; those found damaged by `restore` left out."""
        return sorted(self._manifests())

    def restore(self, abstract_state: Any, step: int | None = None) -> Restored | None:
        """The newest good step, or the given one; None where there is none.

        Args:    abstract_state: pytree of arrays or jax.ShapeDtypeStruct; arrays come back with its shardings (the
                 first device where it has none), whatever devices they were saved from.
        Raises:  UserError where the saved arrays have other names, shapes or dtypes, or the given step is no good.
        """
        self.wait()
        self.problems = [
            f"checkpoint {path.name} was never finished" for path in self._entries() if _UNFINISHED in path.name
        ]
        for candidate in [step] if step is not None else sorted(self._step_paths(), reverse=True):
            manifest = self._verified(candidate)
            if manifest is not None:
                return Restored(candidate, self._load(candidate, manifest, abstract_state), manifest["metadata"])
        if step is not None:
            raise UserError(f"{self.problems[-1]}; good steps are {self.steps()}")
        return None

    def _verified(self, step: int) -> dict[str, Any] | None:
        """The manifest of a good step. Of several processes the first reads every file, and the others believe it."""
        found, problem = None, "is damaged, as the first process has found"
        try:
            if hosts.first():
                found = manifests.verify(self._path(step))
        except manifests.Damaged as damage:
            problem = str(damage)
        if hosts.from_first(found is not None):
            return found or manifests.read(self._path(step))
        self._damaged.add(step)
        self.problems.append(f"checkpoint step {step} {problem}")
        return None

    def _finish(self, step: int, facts: dict[str, Any]) -> None:
        self._checkpointer().wait_until_finished()  # on the first process: all have written
        if hosts.first():
            manifests.seal(self._path(step), facts)
            self._remove_all_but_kept()

    def _remove_all_but_kept(self) -> None:
        good = self._manifests()
        kept = {*sorted(good)[-self._keep_last :], _best(good, self._metric_mode)}
        for path in self._entries():
            if _UNFINISHED in path.name or (path.name.isdecimal() and int(path.name) not in kept):
                manifests.unseal_and_remove(path)

    def _load(self, step: int, manifest: dict[str, Any], abstract_state: Any) -> Any:
        import orbax.checkpoint as ocp

        wanted = {name: _abstract(leaf) for name, leaf in _named_leaves(abstract_state).items()}
        _check_same(step, manifest["arrays"], {name: _described(leaf) for name, leaf in wanted.items()})
        arguments = ocp.args.StandardRestore(_stored(wanted))  # pyright: ignore[reportCallIssue]
        found = self._checkpointer().restore(self._path(step), args=arguments)
        leaves = [found[name] if name in found else _empty(leaf) for name, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)

    def _raise_if_refused(self, step: int, error: Exception) -> None:
        why = refusal(error)
        if why:
            good = [s for s in self.steps() if s != step]
            last = f"step {good[-1]} is the last good one" if good else "no step is saved yet"
            raise UserError(f"{why} while saving step {step}; {last}") from error

    def _checkpointer(self) -> Any:
        if self._orbax is None:
            import orbax.checkpoint as ocp

            self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        return self._orbax

    def _manifests(self) -> dict[int, dict[str, Any]]:
        found = {}
        for step in self._step_paths() - self._damaged:
            try:
                found[step] = manifests.read(self._path(step))
            except manifests.Damaged:
                continue
        return found

    def _entries(self) -> list[epath.Path]:
        return list(self.directory.iterdir()) if self.directory.exists() else []

    def _step_paths(self) -> set[int]:
        return {int(path.name) for path in self._entries() if path.name.isdecimal()}

    def _path(self, step: int) -> epath.Path:
        return self.directory / str(step)


def _best(good: dict[int, dict[str, Any]], mode: str) -> int | None:
    sign = 1.0 if mode == "min" else -1.0
    scores = [(sign * m["metric"], step) for step, m in good.items() if m["metric"] is not None]
    return min(scores)[1] if scores else None


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by name, in the order of the tree; names make the files independent of the tree's Python types."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two leaves of the state have the same name"
    return named


def _described(leaf: Any) -> list[Any]:
    return [np.dtype(leaf.dtype).name, list(leaf.shape)]


def _stored(named: dict[str, Any]) -> dict[str, Any]:
    """What Orbax sees: it refuses arrays without elements, such as the kernels of a layer with no heads."""
    return {name: leaf for name, leaf in named.items() if math.prod(leaf.shape)}


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _empty(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)


def _check_same(step: int, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises UserError for the first array that differs; Orbax would cast dtypes silently."""
    for name in sorted(saved.keys() | wanted.keys()):
        have, want = (f"{d[name][0]}{d[name][1]}" if name in d else "no such array" for d in (saved, wanted))
        if have != want:
            raise UserError(f"checkpoint step {step} does not fit the run: {name} is saved as {have}, wanted is {want}")
