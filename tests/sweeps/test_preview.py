import re

import jax
import pytest

from mha_jax.specs import UserError
from mha_jax.sweeps import grid, preview
from mha_jax.sweeps.plan import Expectation, Memory, duration

EXPECTED = Expectation("toy", ("Toy 1",), 2, {"float32": 1e9}, None, "1 GFLOP/s in float32, an assumption")


@pytest.fixture
def cells(tmp_path):
    def make(sweep):
        file = tmp_path / "study.py"
        file.write_text(f"from configs.default import get_config\ndef get_sweep(profile):\n    yield from {sweep}\n")
        return grid.cells(grid.load(f"{file}:smoke"))

    return make


def outlook(expectation=EXPECTED, memory=lambda run: Memory(5 * 2**20, None, True), workers=3):
    return preview.Outlook(expectation, workers, memory, "made up")


def test_time_and_device_hours_follow_from_the_flops(cells):
    (cell,) = cells("[{'model.num_heads': 8}]")
    lines = preview.table([cell], outlook()).splitlines()
    # 3 × 37,120 FLOPs of 8 × 32 bytes of 2 seeds, on two devices of 1 GFLOP/s: 28.5 ms; 20 steps of it
    assert re.split(r"  +", lines[1])[-3:] == ["28.5 ms", "0.000317", "~5 MiB"]
    assert "on 2 × toy a cell" in lines[2] and lines[2].endswith("1 GFLOP/s in float32, an assumption")
    assert lines[3] == "memory: made up"
    assert lines[4].startswith("1 cells, 40 steps over all seeds, 0.000317 device-hours: about 190 ms with 3 cells at")


def test_what_is_not_known_is_said_and_not_guessed(cells):
    def refuse(run):
        raise UserError("no such backend")

    (cell,) = cells("[{'model.num_heads': 8}]")
    lines = preview.table([cell], outlook("'Toy 9' is not in the table", refuse)).splitlines()
    assert re.split(r"  +", lines[1])[-3:] == ["unknown", "unknown", "none: no such backend"]
    assert lines[2] == "time: unknown: 'Toy 9' is not in the table"
    assert lines[-1] == "1 cells, 40 steps over all seeds; nothing was trained"


def test_illegal_cells_are_listed_with_their_reason(cells):
    made = cells("[{'model.num_heads': 8}, {'model.num_heads': 5}]")
    text = preview.table(made, outlook())
    assert f"left out: {made[1].run_id}: d_model=32 is not a multiple of num_heads=5" in text
    assert "1 cells, 40 steps" in text


def test_sixty_cells_are_priced_without_compiling_anything(cells):
    heads = [1, 2, 4, 8, 16, 32]
    made = cells([{"model.num_heads": h, "model.d_ff": 64 + 8 * i} for h in heads for i in range(10)])
    compiled = []
    listener = lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        devices = {"platform": "cpu", "count": 1}
        text = preview.table(made, outlook(memory=lambda run: preview.estimated_memory(run, devices, None)))
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert len(text.splitlines()) == 1 + 60 + 3
    assert compiled == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.00123, "1.23 ms"), (12.34, "12.3 s"), (90.0, "1.5 min"), (7200.0, "2 h"), (3.6e6, "1e+03 h")],
)
def test_durations_are_told_in_their_unit(seconds, text):
    assert duration(seconds) == text
