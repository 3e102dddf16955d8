"""Figures of heads alive: drawn for a sweep whose cells have gates, with the counts of the log, and for no other."""

import json

import matplotlib as mpl
import numpy as np
import pytest

from mha_jax.reporting import results, tables
from mha_jax.reporting.alive import alive, kept
from mha_jax.reporting.canvas import STYLE

VOITA = "configs/voita2019.py:multi30k"
COUNTS = {1: (72, 60, 55), 4: (72, 20, 11)}  # cell to heads alive at steps 100, 200, 400


@pytest.fixture
def voita(make_sweep):
    """The base cell, two with gates and the first from scratch are done."""
    scratch = 6
    sweep = make_sweep(VOITA, {cell: [1.5, 1.6, 1.55] for cell in (0, *COUNTS, scratch)}, bleu=True)
    for cell, counts in COUNTS.items():
        log = sweep.runs[cell].path / "metrics.jsonl"
        rows = [
            {"step": step, "seed": seed, "split": "validation", "name": name, "value": float(count + seed)}
            for step, count in zip((100, 200, 400), counts, strict=True)
            for seed in (0, 1, 2)
            for name in ("heads_alive", "heads_alive/encoder")
        ]
        log.write_text(log.read_text() + "".join(json.dumps(row) + "\n" for row in rows))
    found = results.read(sweep.path)
    return found, tables.make(found)


def test_heads_alive_are_drawn_by_kind_as_the_mean_of_the_seeds(voita):
    with mpl.rc_context(STYLE):
        figure = alive(*voita)
    assert figure is not None
    whole, encoder = figure.axes
    assert (whole.get_title(loc="left"), encoder.get_title(loc="left")) == ("all attentions", "encoder self-attention")
    drawn = [np.asarray(line.get_ydata()).tolist() for line in whole.get_lines()]
    assert drawn == [[count + 1 for count in counts] for counts in COUNTS.values()]


def test_quality_stands_against_what_is_left_and_cells_without_gates_have_all_their_heads(voita):
    with mpl.rc_context(STYLE):
        figure = kept(*voita)
    assert figure is not None
    drawn = {round(float(bar.lines[0].get_xdata()[0])) for bar in figure.axes[0].containers}
    assert drawn == {72, 56, 12, 36}


def test_a_sweep_without_gates_has_no_such_figures(make_sweep):
    found = results.read(make_sweep("configs/default.py", {0: [1.5, 1.6, 1.4]}).path)
    table = tables.make(found)
    assert alive(found, table) is None and kept(found, table) is None


def test_the_table_shows_heads_alive_where_they_were_counted(voita):
    found, table = voita
    assert "validation/heads_alive" in tables.headlines(found)
    row = next(row for row in table.rows if row.cell is found.cells[4])
    assert row.text[tables.heading("validation/heads_alive")].startswith("12.0")
