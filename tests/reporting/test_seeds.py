"""Seeds that were added are merged into their cell, and the page tells how many more would do."""

import csv

import numpy as np
import pytest

from mha_jax.reporting import build_report, claims, provenance, results, seeds, tables
from mha_jax.sweeps import grid
from mha_jax.sweeps.store import SweepDirectory
from tests.reporting.conftest import write_run

DEFAULT = "configs/default.py"
FACTS = {"versions": {"jax": "0.0.1"}, "commit": "c0ffee00c0ffee", "devices": {"platform": "cpu", "count": 2}}
ONE, EIGHT = [1.55, 1.56, 1.545], [1.50, 1.51, 1.49]
MORE = [0.051, 0.049, 0.052, 0.048, 0.052, 0.055, 0.045]  # what one head loses with seeds 3 to 9


@pytest.fixture
def widened(make_sweep):
    """One and eight heads with seeds 0 to 2, and with seeds 3 to 9 that were added; the other cells are queued."""
    sweep = make_sweep(DEFAULT, {0: ONE, 3: EIGHT})
    study = grid.load(DEFAULT)
    sweep = SweepDirectory.create(sweep.path, study, grid.cells(study), FACTS, range(3, 10))
    eight = np.linspace(1.48, 1.52, 7)
    write_run(sweep.runs[5].path, tuple(range(3, 10)), list(eight + MORE), bleu=False)
    write_run(sweep.runs[8].path, tuple(range(3, 10)), list(eight), bleu=False)
    return sweep


def check(found):
    claim = claims.Claim("…", "validation/loss", {"model.num_heads": 8}, {"model.num_heads": 1})
    return claims.check([claim], found)[0]


def test_a_cell_has_the_seeds_of_all_its_runs(widened):
    found = results.read(widened.path)
    assert sorted(found.cells[0].values("validation/loss")) == list(range(10))
    verdict = check(found)
    assert verdict.status == "held" and verdict.difference is not None and verdict.difference.n == 10
    expected = np.mean([a - b for a, b in zip(ONE, EIGHT, strict=True)] + MORE)
    assert verdict.difference.mean == pytest.approx(expected)
    assert tables.make(found).rows[0].text["n"] == "10"


def test_rows_stand_under_the_run_that_they_come_from(widened):
    rows = results.read(widened.path).rows()
    runs = {run.run_id: run.config["seeds"] for run in widened.runs}
    assert len(rows) == 20 and all(row["seed"] in runs[row["run"]] for row in rows)


@pytest.mark.parametrize("state", ["running", "failed", "stopped", "queued"])
def test_added_seeds_count_once_their_run_is_done(widened, state):
    widened.runs[5].update(state=state, step=120)
    found = results.read(widened.path)
    assert found.cells[0].state == "done"
    assert sorted(found.cells[0].values("validation/loss")) == [0, 1, 2]
    missing = dict(tables.make(found).missing)
    assert missing["h=1, seeds 3..9"].startswith(state)
    assert missing["h=2, seeds 0..2"] == "queued"


def test_a_cell_whose_first_run_failed_has_the_seeds_that_were_added(widened):
    widened.runs[0].update(state="failed", error="out of memory")
    found = results.read(widened.path)
    assert sorted(found.cells[0].values("validation/loss")) == list(range(3, 10))
    assert ("h=1, seeds 0..2", "failed: out of memory") in [(a, b.split(" (")[0]) for a, b in found.missing]


def test_the_caption_tells_in_how_many_batches_seeds_came_and_what_that_costs(widened):
    text = dict(provenance.caption(results.read(widened.path)))["seeds"]
    assert text.startswith("0..9 (n = 10: 3 + 7 seeds, added in 2 batches after a look")
    assert "held at p ≤ 0.025 instead of 0.05" in text
    assert "seeds 0..9" in provenance.footer(results.read(widened.path))


def test_a_second_look_asks_more_of_a_claim(make_sweep):
    """n = 3, t = 0.05 / 0.00908 = 5.5: p = 0.0315 two-sided, held at the first look and not at the second."""
    losses = [b + d for b, d in zip(EIGHT, (0.034, 0.051, 0.065), strict=True)]
    sweep = make_sweep(DEFAULT, {0: losses, 3: EIGHT})
    assert check(results.read(sweep.path)).status == "held"
    study = grid.load(DEFAULT)
    SweepDirectory.create(sweep.path, study, grid.cells(study), FACTS, (3, 4))
    verdict = check(results.read(sweep.path))
    assert verdict.status == "undecided" and "p = 0.031, held at 0.025" in verdict.sentence


def test_the_second_table_says_what_the_seeds_show_and_how_many_more_would(widened):
    found = results.read(widened.path)
    table = seeds.make(found, tables.make(found))
    assert table is not None
    one, eight = table.lines
    assert (one["cell"], one["n"], one["P(better)"]) == ("h=1", "10", "0.00 [0.00, 0.31]")
    assert one["seeds for Δ seen"] == "2 (+0.051)"
    assert one["seeds for 0.02"] == "3", "the margin of the study's own claim"
    assert "P(better)" not in eight and eight["IQM"].startswith("1.500 [")
    assert "0.7 to 1.8 times" in table.note


def test_below_four_seeds_there_is_no_interquartile_mean(make_sweep):
    found = results.read(make_sweep(DEFAULT, {0: ONE, 3: EIGHT}).path)
    table = seeds.make(found, tables.make(found))
    assert table is not None and "IQM" not in table.columns and "0.5 to 6.3 times" in table.note


def test_before_there_is_a_difference_there_is_no_second_table(make_sweep):
    found = results.read(make_sweep(DEFAULT, {3: EIGHT}).path)
    assert seeds.make(found, tables.make(found)) is None


def test_the_page_and_the_files_carry_it(widened):
    page = build_report(widened.path)
    text = page.read_text()
    assert "How many seeds" in text and "seeds for 0.02" in text and "h=1, seeds 3..9" in text
    with (page.parent / "table.csv").open() as file:
        one = next(csv.DictReader(file))
    assert float(one["validation/loss P better high"]) == pytest.approx(1 - 0.025**0.1)
    assert float(one["validation/loss IQM"]) == pytest.approx(float(one["validation/loss"]), abs=0.01)
    assert one["validation/loss seeds for 0.02"] == "3"
