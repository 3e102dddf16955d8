"""A sweep of small cells of one shape, packed and with a process a cell: whole wall time, start-up and all."""

import dataclasses
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from etils import epath

from mha_jax import data
from mha_jax.benchmarks.rounds import paired_ratio, summary
from mha_jax.benchmarks.tables import markdown
from mha_jax.benchmarks.train_step import language_model
from mha_jax.specs import RunSpec, UserError
from mha_jax.sweeps import packing, preparation
from mha_jax.sweeps.cell import Exit
from mha_jax.sweeps.executors import local
from mha_jax.sweeps.store import RunDirectory
from mha_jax.training.metrics import read_metrics

# What a loop over `experiments.train` does; what an unpacked sweep does; what a sweep does.
APART, ALONE, PACKED = "a process a cell, each compiles", "a process a cell, one compile cache", "packed"
WAYS = {"apart": APART, "alone": ALONE, "packed": PACKED}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is timed: a sweep over learning rates, of small language models, on the embedded corpus.

    Every cell is evaluated on both splits and saved at its end. Each sweep has a directory of its own and an empty
    compile cache, or one a cell where each compiles for itself; the data is prepared before.
    """

    cells: int = 6
    steps: int = 100
    num_heads: int = 4
    num_layers: int = 2
    d_model: int = 64
    d_ff: int = 256
    length: int = 64
    batch_size: int = 8
    rounds: int = 3
    workers: int | None = None  # packs at once; left out: as a sweep would choose
    ways: tuple[str, ...] = tuple(WAYS)

    def __post_init__(self) -> None:
        for way in self.ways:
            if way not in WAYS:
                raise UserError(f"ways={way!r} is not one of {', '.join(map(repr, WAYS))}")


def measure(setting: Setting) -> dict[str, Any]:
    """Runs the sweep all ways in turns, each round begun by another one.

    Returns: "rows", one a way: its name, the cells of each pack, "seconds" of every round, "rate" in cell-steps a
    second and "gain", its rate over that of each way with a process a cell, round by round; and "same": whether all
    losses agree.
    Raises:  UserError where the environment names one compile cache for all.
    """
    if cache := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        raise UserError(f"JAX_COMPILATION_CACHE_DIR={cache} would be shared by what is compared: unset it")
    devices = preparation.devices()
    workers = setting.workers or local.default_workers(devices["platform"], setting.cells)
    seconds: dict[str, list[float]] = {WAYS[way]: [] for way in setting.ways}
    sizes: dict[str, list[int]] = {}
    losses: list[list[float]] = []
    with tempfile.TemporaryDirectory() as folder:
        runs = cells(setting, Path(folder) / "data")
        data.load(runs[0].data, runs[0].task, str(runs[0].data.data_dir))
        order = list(seconds)
        for number in range(setting.rounds):
            for way in order:
                made = _directories(runs, Path(folder) / f"{way} {number}", apart=way == APART)
                packs = packing.packs(made, workers=workers, devices=devices) if way == PACKED else [[d] for d in made]
                sizes[way] = [len(pack) for pack in packs]
                start = time.perf_counter()
                if local.run(packs, workers=workers) != Exit.DONE:
                    raise UserError(
                        "; ".join(f"{d.run_id}: {d.status.get('error')}" for d in made if d.state != "done")
                    )
                seconds[way].append(time.perf_counter() - start)
                print(f"round {number + 1}, {way}: {seconds[way][-1]:.1f} s", file=sys.stderr, flush=True)
                losses.append([_last_loss(directory) for directory in made])
            order = order[1:] + order[:1]
    steps = setting.cells * setting.steps
    return {
        "workers": workers,
        "same": all(found == losses[0] for found in losses),
        "rows": [
            {
                "way": way,
                "packs": sizes[way],
                "seconds": values,
                "rate": summary([steps / value for value in values]),
                "gain": {other: paired_ratio(seconds[other], values) for other in (APART, ALONE) if other in seconds},
            }
            for way, values in seconds.items()
        ],
    }


def cells(setting: Setting, data_dir: Path) -> list[RunSpec]:
    """The sweep's runs: one seed each, learning rates a factor 1.3 apart."""
    sizes = dataclasses.asdict(setting)
    count, steps = sizes.pop("cells"), sizes.pop("steps")
    del sizes["rounds"], sizes["workers"], sizes["ways"]
    run = language_model(**sizes)
    training = dataclasses.replace(run.training, steps=steps, eval_every=steps, checkpoint_every=steps)
    run = dataclasses.replace(run, training=training, data=dataclasses.replace(run.data, data_dir=str(data_dir)))
    return [
        dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, learning_rate=1e-3 * 1.3**number))
        for number in range(count)
    ]


def _directories(runs: list[RunSpec], folder: Path, apart: bool) -> list[RunDirectory]:
    """The cells in one sweep's directory, or each in a sweep's of its own, which then has its own compile cache."""
    places = [folder / f"sweep{number}" if apart else folder for number in range(len(runs))]
    return [
        RunDirectory.create(epath.Path(place) / "runs" / f"cell{number}", dataclasses.asdict(run))
        for number, (place, run) in enumerate(zip(places, runs, strict=True))
    ]


def _last_loss(directory: RunDirectory) -> float:
    rows, _ = read_metrics(directory.path / "metrics.jsonl")
    return [row["value"] for row in rows if (row["split"], row["name"]) == ("validation", "loss")][-1]


def table(result: dict[str, Any]) -> str:
    """One row a way: seconds of the whole sweep, cell-steps a second, and the gains over a process a cell."""

    def spread(values: dict[str, float], digits: int) -> str:
        return f"{values['median']:.{digits}f} ({values['min']:.{digits}f}-{values['max']:.{digits}f})"

    rows = [
        [
            row["way"],
            " + ".join(map(str, row["packs"])),
            spread(summary(row["seconds"]), 1),
            spread(row["rate"], 1),
            *(spread(gain, 2) for gain in row["gain"].values()),
        ]
        for row in result["rows"]
    ]
    gains = {APART: "gain over each compiling", ALONE: "gain over one cache"}
    header = ["way", "cells of each process", "sweep s", "cell-steps/s"]
    header += [told for way, told in gains.items() if way in result["rows"][0]["gain"]]
    told = "are the same to the last bit" if result["same"] else "DIFFER"
    return markdown(header, rows) + (
        f"\n\n{result['workers']} processes at once; the last validation losses of all rounds and ways {told}."
    )
