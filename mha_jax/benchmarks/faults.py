"""A sweep that is killed again and again at random moments, and the same sweep left alone: every number must agree."""

import contextlib
import csv
import dataclasses
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mha_jax.benchmarks.tables import markdown
from mha_jax.reporting.results import LARGEST, MEDIANS
from mha_jax.specs import UserError
from mha_jax.sweeps.store import RunDirectory, SweepDirectory
from mha_jax.training import manifests
from mha_jax.training.metrics import read_metrics

DRIVER, CELL, ALL = "kill -9 of the driver", "kill -9 of a cell's process", "SIGTERM to all"
TIMINGS = (*MEDIANS, *LARGEST, "predicted_peak_bytes")  # the last is of a program, which other cells may share
_ENDINGS = (0, 1, 75)  # done; a cell was killed twice in one sitting; stopped with its state saved
_ROOT = Path(__file__).parents[2]
_PATIENCE_SECONDS = 1800.0  # with a driver that hangs

CONFIG = """
from configs import default

def get_config(profile=""):
    config = default.get_config("smoke")
    config.name = "faults"
    config.mesh.data = 1
    config.model.dropout_rate = 0.1
    config.data.source = "text"
    config.data.files.train = {text!r}
    config.training.update(steps={steps}, checkpoint_every={checkpoint_every}, eval_every={eval_every}, log_every=5)
    return config

def get_sweep(profile=""):
    for num_heads in (2, 8):
        for number in range({cells} // 2):
            yield {{"model.num_heads": num_heads, "optimizer.learning_rate": 1e-3 * 2**number}}
"""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is killed: a sweep of small language models, half of them with 2 heads and half with 8, by learning rate.

    A victim is the driver, one process that trains cells, or everybody, who is then asked to stop by SIGTERM; who and
    when follows from `seed`. The driver is started again whenever it has ended, until it ends by itself.
    """

    kills: int = 50
    cells: int = 8
    steps: int = 1500
    checkpoint_every: int = 20
    eval_every: int = 70
    seed: int = 2017

    def __post_init__(self) -> None:
        if self.cells % 2:
            raise UserError(f"cells={self.cells} must be even: half of them have 2 heads, half 8")
        if not Path("/proc/self/cmdline").exists():
            raise UserError("the cells' processes are found under /proc, which this system does not have")


@dataclasses.dataclass
class Sweep:
    """A sweep in a directory: its driver's process, and what was seen of its runs."""

    workdir: Path
    config: Path
    starts: int = 0
    driver: subprocess.Popen | None = None
    finished: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # status when first seen done

    def start(self) -> None:
        self.starts += 1
        command = [sys.executable, "-m", "experiments.sweep", f"--config={self.config}", f"--workdir={self.workdir}"]
        with self.log.open("ab") as log:
            self.driver = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=_ROOT)

    @property
    def log(self) -> Path:
        return self.config.with_suffix(f".{self.workdir.name}.log")

    def ended(self) -> int | None:
        """The driver's exit code; None while it runs. Raises RuntimeError for an end that no fault explains."""
        assert self.driver is not None
        code = self.driver.poll()
        if code is not None and code not in (*_ENDINGS, -signal.SIGKILL, -signal.SIGTERM):
            raise RuntimeError(f"the driver ended with {code}:\n{self.log.read_text()[-3000:]}")
        return code

    def wait(self) -> int:
        """Waits for the driver to end by itself; where it does not, or we are interrupted, it is killed."""
        assert self.driver is not None
        try:
            self.driver.wait(_PATIENCE_SECONDS)
        finally:
            self.driver.kill()
        code = self.ended()
        assert code is not None
        return code

    def processes(self) -> dict[int, list[RunDirectory]]:
        """The runs that each process of a cell, or of several packed together, was started for."""
        assert self.driver is not None
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
                words = (path / "cmdline").read_text().split("\0")
            except (OSError, IndexError):
                continue  # it has just ended
            if parent == self.driver.pid and "mha_jax.sweeps.cell" in words:
                found[int(path.name)] = [RunDirectory(w) for w in words if w.startswith(str(self.workdir))]
        return found

    def look(self) -> None:
        """Remembers the status of every run that is done for the first time."""
        if (self.workdir / "sweep.json").exists():
            for run in SweepDirectory(self.workdir).runs:
                if run.state == "done":
                    self.finished.setdefault(run.run_id, run.status)


def measure(setting: Setting) -> dict[str, Any]:
    """Runs the sweep undisturbed and then under fire, and compares what both left.

    Returns: "rows", a cell each; "kills" in their order; "counts" of kills by victim, starts, and values compared;
             "differences", all 0 where the faults changed nothing; "seconds" of both sweeps.
    Raises:  RuntimeError where a driver ends in a way that the faults do not explain. The sweeps are kept where it
             does, and where they differ.
    """
    place = Path(tempfile.mkdtemp(prefix="mha_jax-faults-"))
    config = write_config(place, setting)
    calm, struck = (Sweep(place / name, config) for name in ("calm", "struck"))
    start = time.perf_counter()
    calm.start()
    if calm.wait():
        raise RuntimeError(f"the undisturbed sweep failed:\n{calm.log.read_text()[-3000:]}")
    calm_seconds = time.perf_counter() - start
    kills = campaign(struck, setting)
    seconds = {"undisturbed": calm_seconds, "under fire": time.perf_counter() - start - calm_seconds}
    values, differences = compare(calm, struck)
    runs = SweepDirectory(struck.workdir).runs
    rows = [{"run": run.run_id, "state": run.state, "attempts": run.status["attempts"]} for run in runs]
    if any(differences.values()):
        print(f"the sweeps differ and are kept: {place}", file=sys.stderr)
    else:
        shutil.rmtree(place)
    counts = {kind: sum(kill["victim"] == kind for kill in kills) for kind in (DRIVER, CELL, ALL)}
    counts |= {"starts of the driver": struck.starts, "values compared": values}
    return {"rows": rows, "kills": kills, "counts": counts, "differences": differences, "seconds": seconds}


def write_config(place: Path, setting: Setting) -> Path:
    """Writes the sweep's config file and the text that it trains on into a directory; the path of the config."""
    words = random.Random(setting.seed).choices(("head", "query", "key", "value", "wide", "narrow"), k=3000)
    text = place / "text.txt"
    text.write_text("\n\n".join(" ".join(words[i : i + 30]) for i in range(0, len(words), 30)))
    config = place / "faults.py"
    config.write_text(CONFIG.format(**dataclasses.asdict(setting), text=str(text)))
    return config


def campaign(sweep: Sweep, setting: Setting) -> list[dict[str, Any]]:
    """Kills, starts again, and at last lets the sweep end; what each kill hit."""
    moments = random.Random(setting.seed)
    kills = []
    sweep.start()
    while len(kills) < setting.kills:
        over = len(sweep.finished) == setting.cells  # then there are only drivers, which find nothing to do
        victim = moments.choice((DRIVER, ALL) if over else (DRIVER, CELL, CELL, ALL))
        # A third strikes at any moment, mostly while something starts or compiles; the others while steps are trained.
        anywhere, delay = over or moments.random() < 0.33, moments.uniform(0, 3)
        if not anywhere:
            _await_training(sweep)
        time.sleep(2 * delay if anywhere else delay)
        hit = _strike(sweep, victim, moments)
        sweep.look()
        if hit is not None:
            kills.append({"victim": victim, "cells_done": len(sweep.finished), **hit})
        if sweep.ended() is not None:
            sweep.start()
    while sweep.wait():
        sweep.start()
    sweep.look()
    return kills


def _await_training(sweep: Sweep) -> None:
    """Returns when a cell trains step after step, or the driver has ended."""
    end = time.monotonic() + _PATIENCE_SECONDS
    first: dict[int, list[int]] = {}
    while sweep.ended() is None and time.monotonic() < end:
        for pid, runs in sweep.processes().items():
            steps = [run.step for run in runs if run.state == "running"]
            if steps and first.setdefault(pid, steps) != steps:
                return
        time.sleep(0.05)


def _strike(sweep: Sweep, victim: str, moments: random.Random) -> dict[str, Any] | None:
    """Kills and waits until the victims are gone. None where there was nobody to kill any more."""
    assert sweep.driver is not None
    cells = sweep.processes()
    if sweep.ended() is not None or (victim == CELL and not cells):
        return None
    if victim == CELL:
        pid = moments.choice(sorted(cells))
        _signal(pid, signal.SIGKILL)
        return {"training": len(cells), **_lost(cells[pid])}
    if victim == DRIVER:
        sweep.driver.kill()
    else:
        for pid in (sweep.driver.pid, *cells):
            _signal(pid, signal.SIGTERM)
    sweep.driver.wait(_PATIENCE_SECONDS)
    return {"training": len(cells)}


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _lost(runs: list[RunDirectory]) -> dict[str, Any]:
    """The steps that a killed process has trained since the newest checkpoint that all its runs have.

    Steps are told every fifth, so that up to four more are lost than this says.
    """
    going = [run for run in runs if run.state != "done"]
    saved = min((_saved(run) for run in going), default=0)
    return {"steps_lost": max((run.step - saved for run in going), default=0)}


def _saved(run: RunDirectory) -> int:
    steps = []
    for path in (run.path / "checkpoints").glob("*"):
        with contextlib.suppress(manifests.Damaged):
            steps.append(manifests.read(path)["step"])
    return max(steps, default=0)


def compare(calm: Sweep, struck: Sweep) -> tuple[int, dict[str, int]]:
    """How many values were compared, and how many of what should agree does not."""
    values, differing, twice = 0, 0, 0
    pairs = list(zip(SweepDirectory(calm.workdir).runs, SweepDirectory(struck.workdir).runs, strict=True))
    for one, other in pairs:
        (expected, _), (found, repeated) = _values(one), _values(other)
        values += len(expected)
        differing += sum(expected.get(key) != found.get(key) for key in expected.keys() | found.keys())
        twice += repeated
    again = [run for run in SweepDirectory(struck.workdir).runs if run.status != struck.finished[run.run_id]]
    tables = [_results(sweep.workdir / "report" / "results.csv") for sweep in (calm, struck)]
    return values, {
        "results.csv differs (timings aside)": int(tables[0] != tables[1]),
        "values of metrics.jsonl that differ": differing,
        "lines written twice": twice,
        "finished cells started again": len(again),
    }


def _values(run: RunDirectory) -> tuple[dict[Any, str], int]:
    """Every value of a run but timings, as it is written, by (step, seed, split, name); and how many come twice."""
    rows, corrupt = read_metrics(run.path / "metrics.jsonl")
    rows = [row for row in rows if row["name"] not in TIMINGS]
    values = {(row["step"], row["seed"], row["split"], row["name"]): repr(row["value"]) for row in rows}
    return values, len(rows) - len(values) + len(corrupt)


def _results(file: Path) -> list[list[str]]:
    """The cells of results.csv as text, its columns of timings left out."""
    header, *rows = csv.reader(io.StringIO(file.read_text()))
    kept = [i for i, name in enumerate(header) if name not in TIMINGS]
    return [[row[i] for i in kept] for row in [header, *rows]]


def table(result: dict[str, Any]) -> str:
    """The cells, the kills by victim, and what differs, as markdown."""
    cells = markdown(["cell", "state", "attempts"], [list(map(str, row.values())) for row in result["rows"]])
    counts = markdown(["what", "times"], [[name, f"{count:,}"] for name, count in result["counts"].items()])
    lost = [kill["steps_lost"] for kill in result["kills"] if "steps_lost" in kill]
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in result["seconds"].items())
    lines = [f"- {name}: {count}" for name, count in result["differences"].items()]
    every = result["setting"]["checkpoint_every"]
    if lost:
        lines.append(f"- steps trained twice after a cell was killed: {max(lost)} at most, a checkpoint every {every}")
    during = sum(kill["training"] > 0 for kill in result["kills"])
    lines.append(f"- kills that hit a process training cells, or its driver: {during} of {len(result['kills'])}")
    return "\n\n".join([cells, counts, "\n".join(lines), f"Wall time: {seconds}."])
