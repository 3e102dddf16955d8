"""What a report says of a tuned sweep: columns, edges, failures, a row a trial, a figure."""

import csv
import dataclasses
import math

import pytest

from mha_jax.config import flatten
from mha_jax.reporting import build_report, claims, results, tables
from mha_jax.reporting.trials import notes
from mha_jax.sweeps import grid
from mha_jax.sweeps.cell import Exit
from mha_jax.sweeps.claims import parse
from mha_jax.sweeps.search import search
from mha_jax.sweeps.store import SweepDirectory
from mha_jax.sweeps.trials import read_trials
from mha_jax.sweeps.tuning import parse_tuning

from .conftest import write_run

RATE = "optimizer.learning_rate"
BEST = {1: 4e-3, 2: 2e-3, 4: 2e-3, 8: 1e-3, 16: 5e-4}


def train(runs):
    """The loss grows with the distance from the rate that is best for the head count; 16 heads diverge at 4e-3."""
    for run in runs:
        config = flatten(run.config)
        heads, rate = config["model.num_heads"], config[RATE]
        if (heads, rate) == (16, 4e-3):
            run.update(state="failed", error="NonFiniteLoss: loss is not finite at step 7, seed 3")
            continue
        value = 1.5 + 0.1 * abs(math.log(rate / BEST[heads]))
        write_run(run.path, config["seeds"], [value + 0.01 * seed for seed in config["seeds"]], bleu=False)
    return Exit.DONE


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The default grid, tuned and trained."""
    study = grid.load("configs/default.py:tuned")
    cells = grid.cells(study)
    workdir = tmp_path_factory.mktemp("tuned")
    chosen, _ = search(parse_tuning(study, cells), cells, workdir, train)
    made = SweepDirectory.create(workdir, study, chosen, {"versions": {}, "commit": None, "devices": {"count": 1}})
    train(made.runs)
    build_report(workdir)
    return made


def column(table, name):
    return [row.text.get(name) for row in table.rows]


def test_the_table_has_the_chosen_value_and_the_budget_beside_the_test_split(sweep):
    table = tables.make(results.read(sweep.path))
    assert column(table, "h") == ["1", "2", "4", "8", "16"]
    assert column(table, "tuned learning rate") == ["0.004", "0.002", "0.002", "0.001", "0.0005"]
    assert column(table, "tuned by") == ["4 trials × 1 seed"] * 5
    assert all(column(table, "test loss"))


def test_cells_claims_and_the_base_are_found_by_the_grids_own_overrides(sweep):
    found = results.read(sweep.path)
    assert found.find({"model.num_heads": 4}) is found.cells[2]
    assert found.base is found.find({}) is found.cells[3]
    assert found.label({"model.num_heads": 16}) == "h=16"
    verdict = claims.check([parse(claim) for claim in found.sweep["claims"]], found)[0]
    assert verdict.difference is not None and verdict.difference.n == 3


def test_results_csv_has_the_tuned_field_as_a_column(sweep):
    with (sweep.path / "report" / "results.csv").open() as file:
        rates = {(row["model.num_heads"], row[RATE]) for row in csv.DictReader(file)}
    assert rates == {(str(heads), str(rate)) for heads, rate in BEST.items()}


def test_tuning_csv_has_every_trial(sweep):
    with (sweep.path / "report" / "tuning.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    assert [(row["cell"], float(row[RATE])) for row in rows if row["chosen"] == "True"] == [
        (f"h={heads}", rate) for heads, rate in BEST.items()
    ]
    failed = rows[19]
    assert (failed["state"], failed["validation/loss"]) == ("failed", "")
    assert failed["why not"] == "NonFiniteLoss: loss is not finite at step 7, seed 3"


def test_cells_at_one_edge_are_told_together(sweep):
    found = results.read(sweep.path)
    narrow = dataclasses.replace(found, tuning={**found.tuning, "fields": {RATE: [5e-4, 2e-3]}})
    assert dict(notes(narrow))["at the edge of the search"].startswith("h=2, h=4: optimizer.learning_rate=0.002 is at")


def test_the_caption_tells_the_search_its_edges_and_its_failures(sweep):
    told = dict(notes(results.read(sweep.path)))
    assert "best by validation/loss at the last step, of 4 trials of a grid with seed 3" in told["tuning"]
    assert "the table's runs use others" in told["tuning"]
    assert told["at the edge of the search"] == (
        "h=1: optimizer.learning_rate=0.004 is at the largest end: widen it; "
        "h=16: optimizer.learning_rate=0.0005 is at the smallest end: widen it"
    )
    assert told["trials without a result"].startswith("h=16 with learning_rate=0.004: NonFiniteLoss")
    assert "widen it" in (sweep.path / "report" / "table.md").read_text()


def test_seeds_that_serve_both_are_told(sweep):
    found = results.read(sweep.path)
    shared = dataclasses.replace(found, tuning={**found.tuning, "seeds": [2, 3]})
    assert "runs use seed 2 too, which flatters them" in dict(notes(shared))["tuning"]


def test_a_range_has_an_edge_at_its_last_twentieth(sweep):
    found = results.read(sweep.path)
    rates = {"low": 4.9e-4, "high": 0.05, "log": True}
    told = dict(notes(dataclasses.replace(found, tuning={**found.tuning, "fields": {RATE: rates}})))
    assert told["at the edge of the search"].startswith("h=16: ") and "h=1:" not in told["at the edge of the search"]


def test_the_page_links_the_trials_and_shows_the_figure(sweep):
    page = (sweep.path / "report" / "index.html").read_text()
    assert 'href="tuning.csv"' in page and "What tuning chose" in page
    svg = (sweep.path / "report" / "tuning.svg").read_text()
    assert svg.startswith("<?xml") and (sweep.path / "report" / "tuning.png").exists()


def test_a_cell_that_tuning_gave_up_is_failed_with_the_reason(sweep, tmp_path):
    study = grid.load("configs/default.py:tuned")
    cells = grid.cells(study)

    def none_of_8(runs):
        for run in runs:
            if run.config["model"]["num_heads"] == 8:
                run.update(state="failed", error="killed by SIGKILL (out of memory?)")
        return train([run for run in runs if run.state != "failed"])

    chosen, _ = search(parse_tuning(study, cells), cells, tmp_path, none_of_8)
    SweepDirectory.create(tmp_path, study, chosen, {})
    cell = results.read(tmp_path).base
    assert cell is not None and cell.state == "failed"
    assert cell.summary == "failed: none of its 4 trials has a result, the first: killed by SIGKILL (out of memory?)"


def test_while_trials_train_the_report_says_how_many_are_open(tmp_path):
    study = grid.load("configs/default.py:tuned")
    cells = grid.cells(study)
    SweepDirectory.create(tmp_path, study, cells, {})
    search(parse_tuning(study, cells), cells, tmp_path, lambda runs: (train(runs[:7]), Exit.STOPPED)[1])
    assert len(read_trials(tmp_path)) == 20
    assert dict(notes(results.read(tmp_path)))["tuning under way"] == "13 of 20 trials have not ended"
    assert "No cell has finished yet" in build_report(tmp_path).read_text()
