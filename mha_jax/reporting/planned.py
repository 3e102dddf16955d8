"""What each run was expected to take, and what it took."""

import statistics
from typing import Any

from mha_jax.reporting.results import Results, Run
from mha_jax.sweeps.plan import Expectation, duration


def basis(results: Results) -> str:
    """What the expectation rests on; empty where the sweep has none."""
    found = _expectation(results)
    return f"{found} a cell, with what one reaches taken to be {found.basis}" if found else ""


def rows(results: Results) -> list[dict[str, Any]]:
    """One row a run that trained on the device that was planned for: seconds a step and of all training steps, planned
    and measured, the whole time with start-up, compilation and evaluation, and device-hours.

    A measured step is the median of the training log; of runs that trained together each has its share.
    """
    expected = _expectation(results)
    if expected is None:
        return []
    pairs = zip(results.labels, results.runs, strict=True)
    return [row for label, run in pairs if (row := _row(label, run, expected)) is not None]


def text(row: dict[str, Any]) -> dict[str, str]:
    """A row as the page shows it."""
    times = {name: duration(value) for name, value in row.items() if name.endswith("_seconds")}
    hours = {name: f"{value:,.3g}" for name, value in row.items() if name.endswith("_hours")}
    return {"cell": row["cell"], **times, **hours, "ratio": f"{row['step_seconds'] / row['planned_step_seconds']:.2f}"}


def _expectation(results: Results) -> Expectation | None:
    facts = results.sweep.get("expectation")
    return Expectation.from_facts(facts) if facts else None


def _row(label: str, run: Run, expected: Expectation) -> dict[str, Any] | None:
    status, seconds = run.status, run.status.get("seconds", {})
    steps = [row["value"] for row in run.log if (row["split"], row["name"]) == ("train", "step_seconds")]
    known = status.get("step_flops") is not None and run.config is not None
    if not steps or not known or status.get("devices", {}).get("kind") not in expected.kinds or run.state != "done":
        return None
    dtype = (run.config or {})["model"]["dtype"]
    planned = expected.step_seconds(status["step_flops"], status["update_bytes"], dtype)
    if planned is None:
        return None
    whole = float(sum(seconds.values()))
    return {
        "cell": label,
        "run": run.run,
        "planned_step_seconds": planned,
        "step_seconds": float(statistics.median(steps)),
        "planned_train_seconds": planned * status["steps"],
        "train_seconds": float(seconds.get("train", 0.0)),
        "whole_seconds": whole,
        "planned_device_hours": expected.device_hours(planned, status["steps"]),
        "device_hours": whole * expected.devices / 3600,
    }
