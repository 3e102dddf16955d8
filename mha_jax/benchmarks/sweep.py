"""A sweep of small cells of one shape, packed and with a process a cell: whole wall time, start-up and all."""

import dataclasses
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

PACKED, ALONE = "packed", "a process a cell"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is timed: a sweep over learning rates, of small language models, on the embedded corpus.

    Every cell is evaluated on both splits and saved at its end. Each sweep has a directory of its own and an empty
    compile cache; the data is prepared before.
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


def measure(setting: Setting) -> dict[str, Any]:
    """Runs the sweep both ways in turns, each round begun by the other one.

    Returns: "rows", one a way: its name, the cells of each pack, "seconds" of every round, "rate" in cell-steps a
    second and "gain", its rate over that of a process a cell, round by round; and "same": whether all losses agree.
    """
    devices = preparation.devices()
    workers = setting.workers or local.default_workers(devices["platform"], setting.cells)
    seconds: dict[str, list[float]] = {ALONE: [], PACKED: []}
    sizes: dict[str, list[int]] = {}
    losses: list[list[float]] = []
    with tempfile.TemporaryDirectory() as folder:
        runs = cells(setting, Path(folder) / "data")
        data.load(runs[0].data, runs[0].task, str(runs[0].data.data_dir))
        order = list(seconds)
        for number in range(setting.rounds):
            for way in order:
                made = _directories(runs, Path(folder) / f"{way} {number}")
                packs = packing.packs(made, workers=workers, devices=devices) if way == PACKED else [[d] for d in made]
                sizes[way] = [len(pack) for pack in packs]
                start = time.perf_counter()
                if local.run(packs, workers=workers) != Exit.DONE:
                    raise UserError(
                        "; ".join(f"{d.run_id}: {d.status.get('error')}" for d in made if d.state != "done")
                    )
                seconds[way].append(time.perf_counter() - start)
                losses.append([_last_loss(directory) for directory in made])
            order.reverse()
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
                "gain": paired_ratio(seconds[ALONE], values),
            }
            for way, values in seconds.items()
        ],
    }


def cells(setting: Setting, data_dir: Path) -> list[RunSpec]:
    """The sweep's runs: one seed each, learning rates a factor 1.3 apart."""
    sizes = dataclasses.asdict(setting)
    count, steps = sizes.pop("cells"), sizes.pop("steps")
    del sizes["rounds"], sizes["workers"]
    run = language_model(**sizes)
    training = dataclasses.replace(run.training, steps=steps, eval_every=steps, checkpoint_every=steps)
    run = dataclasses.replace(run, training=training, data=dataclasses.replace(run.data, data_dir=str(data_dir)))
    return [
        dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, learning_rate=1e-3 * 1.3**number))
        for number in range(count)
    ]


def _directories(runs: list[RunSpec], workdir: Path) -> list[RunDirectory]:
    return [
        RunDirectory.create(epath.Path(workdir) / "runs" / f"cell{number}", dataclasses.asdict(run))
        for number, run in enumerate(runs)
    ]


def _last_loss(directory: RunDirectory) -> float:
    rows, _ = read_metrics(directory.path / "metrics.jsonl")
    return [row["value"] for row in rows if (row["split"], row["name"]) == ("validation", "loss")][-1]


def table(result: dict[str, Any]) -> str:
    """One row a way: seconds of the whole sweep, cell-steps a second, and the gain over a process a cell."""

    def spread(values: dict[str, float], digits: int) -> str:
        return f"{values['median']:.{digits}f} ({values['min']:.{digits}f}-{values['max']:.{digits}f})"

    rows = [
        [
            row["way"],
            " + ".join(map(str, row["packs"])),
            spread(summary(row["seconds"]), 1),
            spread(row["rate"], 1),
            spread(row["gain"], 2),
        ]
        for row in result["rows"]
    ]
    header = ["way", "cells of each process", "sweep s", "cell-steps/s", "gain"]
    told = "are the same to the last bit" if result["same"] else "DIFFER"
    return markdown(header, rows) + (
        f"\n\n{result['workers']} processes at once; the last validation losses of all rounds and ways {told}."
    )
