"""Directories of runs and sweeps: written atomically, locked while in use, never mixed with another config's."""

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mha_jax import config as configs
from mha_jax.specs import UserError
from mha_jax.sweeps import grid, seeds
from mha_jax.sweeps.sameness import check_same
from mha_jax.training import hosts


class Busy(UserError):
    """Another process is training this run."""


def write_json(path: epath.Path, value: Any) -> None:
    """Replaces the file at once: a reader, or a kill at any moment, finds the old or the new text, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f".{path.name}.{socket.gethostname()}.{os.getpid()}"
    try:
        beside.write_text(json.dumps(value, indent=2) + "\n")
        beside.replace(path)
    except OSError as error:
        error.filename = os.fspath(path)  # a full disk names no file, and nobody knows the one beside
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def read_json(path: epath.Path) -> dict[str, Any]:
    """Raises UserError, one line, where the text is no JSON object."""
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (it holds no JSON object)")
    return value


class RunDirectory:
    """`DIR/runs/<slug>-<hash8>`: config.json, status.json, metrics.jsonl, checkpoints/, tensorboard/, error.txt."""

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)

    @classmethod
    def create(cls, path: epath.PathLike, config: ConfigDict | Mapping[str, Any]) -> "RunDirectory":
        """Makes the directory, or opens the one that is there.

        Raises: UserError with the differing fields where it belongs to another config.
        """
        directory = cls(path)
        file = directory.path / "config.json"
        tree = configs.plain(config)
        if file.exists():
            changes = configs.diff(directory.config, tree)
            if changes:
                raise UserError(f"{directory.path} belongs to another config: {'; '.join(changes)}")
            if directory.config == tree:
                return directory
        write_json(file, tree)  # anew where only the placement changed, such as the devices
        return directory

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def workdir(self) -> epath.Path:
        return self.path.parent.parent

    @property
    def sweep(self) -> epath.Path:
        """Where the caches of its sweep lie: that of a trial, which is in DIR/tuning/runs, is DIR."""
        return self.workdir.parent if (self.workdir / "trials.json").exists() else self.workdir

    @property
    def config(self) -> dict[str, Any]:
        file = self.path / "config.json"
        if not file.exists():
            raise UserError(f"{self.path} is no run directory: it has no config.json")
        return read_json(file)

    @property
    def status(self) -> dict[str, Any]:
        """Facts about the run so far; {"state": "queued"} before it first starts."""
        file = self.path / "status.json"
        return read_json(file) if file.exists() else {"state": "queued"}

    @property
    def state(self) -> str:
        """ "queued", "running", "done", "failed" or "stopped"; a killed run stays "running" until it is run again.

        "damaged" where status.json cannot be read: what asks for the states of many runs goes on with the others.
        """
        return self._readable.get("state", "damaged")

    @property
    def step(self) -> int:
        """The last step that was reported; 0 where none was, or it cannot be read."""
        return int(self._readable.get("step", 0))

    @property
    def _readable(self) -> dict[str, Any]:
        try:
            return self.status
        except UserError:
            return {}

    def update(self, **facts: Any) -> None:
        """Sets facts of status.json and leaves the others. Of several processes of a run the first one does."""
        if not hosts.first():
            return
        write_json(self.path / "status.json", {**self.status, **facts})

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for this process, or where it is one of several for them all: then the first does it.

        The lock ends with the process, however that ends.

        Raises: Busy where another process holds it.
        """
        if not hosts.first():
            yield
            return
        with self.beside("lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise Busy(
                    f"run {self.run_id} is being trained by {file.read().strip() or 'another process'}"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield

    @property
    def locked(self) -> bool:
        try:
            with self.lock():
                return False
        except Busy:
            return True

    def beside(self, name: str) -> Path:
        """A file on this machine: in the directory itself, or under the temporary files where that is a bucket."""
        if "://" not in os.fspath(self.path):
            return Path(self.path) / name
        key = hashlib.sha256(os.fspath(self.path).encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"mha_jax-{key}-{name}"

    @property
    def prediction(self) -> str:
        """ " predicted: 1,234 MiB", of its memory at the peak; empty where nothing was predicted yet."""
        peak = self._readable.get("predicted_peak_bytes")
        return "" if peak is None else f" predicted: {peak / 2**20:,.0f} MiB"

    @property
    def failure(self) -> str:
        """One line: which run failed, why, and where its traceback lies."""
        error = self.status.get("error") or "no reason was recorded"
        return f"run {self.run_id} failed: {error}; its traceback lies in {self.path / 'error.txt'}"


class SweepDirectory:
    """`DIR`: sweep.json, runs/, report/."""

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)

    @classmethod
    def create(
        cls,
        path: epath.PathLike,
        study: grid.Study,
        made: list[grid.Cell],
        facts: Mapping[str, Any],
        more_seeds: Sequence[int] = (),
    ) -> "SweepDirectory":
        """Makes the directory, or opens the one that is there, and writes sweep.json and a directory a legal cell.

        Args:    facts: versions, commit, devices: what is recorded beside the grid.
                 more_seeds: those that no run has yet get a further run in every cell, of the cell's own config.
        Raises:  UserError with the difference where it holds another sweep.
        """
        directory = cls(path)
        file = directory.path / "sweep.json"
        # Where sweep.json was lost, the runs themselves say which seeds were added.
        first = tuple(study.config.seeds)  # pyright: ignore[reportArgumentType]
        earlier = directory.seeds[1:] if file.exists() else directory._found_seeds(made)
        batches = [first, *(batch for batch in earlier if batch != first)]
        new_seeds = tuple(seed for seed in more_seeds if not any(seed in batch for batch in batches))
        batches += [new_seeds] if new_seeds else []
        added = [seeds.with_seeds(made, batch) for batch in batches[1:]]
        new = {
            "config_file": study.path,
            "config_sha256": study.sha256,
            "profile": study.profile,
            "docstring": study.docstring,
            "base_config": configs.plain(study.config),
            "base": grid.base_run_id(study, made),
            "cells": [_cell(cell, more) for cell, *more in zip(made, *added, strict=True)],
            "batches": configs.plain(batches),
            "tuning": configs.plain(study.tuning),
            "paper": configs.plain(study.paper),
            "claims": configs.plain(study.claims),
            **facts,
        }
        if file.exists() and directory.in_use:
            check_same(directory.path, read_json(file), new)
        # A cell whose values are still being searched has no run yet.
        legal = [cell for cells in (made, *added) for cell in cells if cell.reason is None]
        for cell in (cell for cell in legal if study.tuning is None or cell.untuned):
            RunDirectory.create(directory.run_path(cell.run_id), cell.config)
        write_json(file, new)
        return directory

    def run_path(self, run_id: str) -> epath.Path:
        return self.path / "runs" / run_id

    @property
    def in_use(self) -> bool:
        """Whether anything has been trained here, so that a sweep mended after a mistake may take the place."""
        runs = [path for place in ("runs", "tuning/runs") for path in (self.path / place).glob("*")]
        return any((path / "metrics.jsonl").exists() or RunDirectory(path).locked for path in runs)

    @property
    def facts(self) -> dict[str, Any]:
        return read_json(self.path / "sweep.json")

    def place(self, run_id: str) -> int:
        """Which of `runs`, counted from 0, a run is; 0 for one that is none of them."""
        runs = self.runs if (self.path / "sweep.json").exists() else []
        return next((place for place, run in enumerate(runs) if run.run_id == run_id), 0)

    @property
    def seeds(self) -> list[tuple[int, ...]]:
        """The seeds that the sweep began with, then those of each time that some were added; none before it trains."""
        if not self.in_use or not (self.path / "sweep.json").exists():
            return []
        facts = self.facts
        return [tuple(batch) for batch in facts.get("batches", [facts["base_config"]["seeds"]])]

    def seeds_there(self, made: Sequence[grid.Cell]) -> list[tuple[int, ...]]:
        """`seeds`, from the runs where sweep.json is lost or damaged."""
        try:
            return self.seeds or (self._found_seeds(made) if self.in_use else [])
        except UserError:
            return self._found_seeds(made)

    def _found_seeds(self, made: Sequence[grid.Cell]) -> list[tuple[int, ...]]:
        """The seeds of runs that differ from the first legal cell by theirs at most; those that were added come last.

        The name of a run says whether its seeds were added.
        """
        first = next(cell.config for cell in made if cell.reason is None)
        found = []
        for file in (self.path / "runs").glob("*/config.json"):
            with contextlib.suppress(UserError):  # a damaged config.json tells no seeds
                config = read_json(file)
                if {change.split(":")[0] for change in configs.diff(first, config)} <= {"seeds"}:
                    found.append(("seeds=" in file.parent.name, tuple(config["seeds"])))
        return [batch for _, batch in sorted(found)]

    @property
    def runs(self) -> list[RunDirectory]:
        """The directories of the legal cells, in the order of the grid, then the same with seeds that were added.

        A cell that is yet to be tuned has none.
        """
        facts = self.facts
        pending = facts.get("tuning") is not None
        ready = [c for c in facts["cells"] if c["reason"] is None and not (pending and "untuned" not in c)]
        names = [cell["run"] for cell in ready]
        for number in range(len(facts.get("batches", [])) - 1):
            names += [cell["added"][number] for cell in ready]
        return [RunDirectory(self.run_path(name)) for name in names]


def _cell(cell: grid.Cell, more: Sequence[grid.Cell]) -> dict[str, Any]:
    """`more`: the same cell with seeds that were added."""
    facts = {"run": cell.run_id, "overrides": configs.plain(cell.overrides), "reason": cell.reason}
    facts |= {"added": [other.run_id for other in more]} if more else {}
    return facts if cell.untuned is None else facts | {"tuned": configs.plain(cell.tuned), "untuned": cell.untuned}
