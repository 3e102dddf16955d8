"""Sweeps that were never trained: real directories with made-up metrics."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from mha_jax.sweeps import grid
from mha_jax.sweeps.store import SweepDirectory

Losses = dict[int, list[float]]  # cell, in the order of the grid, to one final value a seed


def write_sweep(workdir: Path, config: str, losses: Losses, bleu: bool = False) -> SweepDirectory:
    """The cells named in `losses` are done with that validation loss; the others are queued."""
    study = grid.load(config)
    cells = grid.cells(study)
    facts = {"versions": {"jax": "0.0.1"}, "commit": "c0ffee00c0ffee", "devices": {"platform": "cpu", "count": 2}}
    sweep = SweepDirectory.create(workdir, study, cells, facts)
    for i, values in losses.items():
        write_run(sweep.run_path(cells[i].run_id), cells[i].config.seeds, values, bleu)
    return sweep


def write_run(path: epath.Path, seeds: tuple[int, ...], values: list[float], bleu: bool, steps: int = 400) -> None:
    """A finished run whose validation loss falls to `values` (one a seed) at step 400."""
    lines = []

    def log(step: int, split: str, name: str, row: Any) -> None:
        row = np.broadcast_to(np.asarray(row, float), (len(seeds),))
        lines.extend(
            {"step": step, "seed": seed, "split": split, "name": name, "value": float(v)}
            for seed, v in zip(seeds, row, strict=True)
        )

    final = np.asarray(values)
    for step in (100, 200, 300, 400):
        loss = final + 2.0 * np.exp(-step / 90) - 2.0 * np.exp(-400 / 90)
        log(step, "train", "tokens_per_second", 1000.0 + step)
        log(step, "train", "step_seconds", 0.25)
        log(step, "validation", "loss", loss)
        log(step, "validation", "perplexity", np.exp(loss))
    log(steps, "test", "loss", final + 0.01)
    if bleu:
        log(steps, "validation", "bleu", 60 - 18 * final)
        log(steps, "test", "bleu", 59 - 18 * final)
    log(steps, "train", "compile_seconds", 3.5)
    log(steps, "train", "peak_bytes", 3 * 2**20)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status = {
        "state": "done",
        "step": steps,
        "steps": steps,
        "parameters": 421_376,
        "flops_per_token": 900_000,
        "kv_cache_bytes_per_token": 2048,
        "predicted_peak_bytes": 5 * 2**20,
        "commit": "c0ffee00c0ffee",
        "devices": {"platform": "cpu", "kind": "cpu", "count": 2},
        "device_kind": "cpu",
        "data": {"source": "a corpus", "sha256": "ab" * 32, "splits": {"train": {"examples": 11, "tokens": 1300}}},
        "seconds": {"imports": 4.0, "data": 1.0, "compile": 3.5, "train": 90.0, "eval": 6.0, "save": 0.5},
    } | ({"bleu_signature": "nrefs:1|case:mixed"} if bleu else {})
    (path / "status.json").write_text(json.dumps(status))


@pytest.fixture
def make_sweep(tmp_path: Path) -> Callable[..., SweepDirectory]:
    return lambda config, losses, bleu=False: write_sweep(tmp_path / "sweep", config, losses, bleu)
