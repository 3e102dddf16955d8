"""The simulated sweeps are decided as real ones are, and the checker is as honest as it says."""

import math

import numpy as np
import pytest

from experiments import claims_simulation
from mha_jax.reporting import claims
from mha_jax.reporting.power import power
from mha_jax.reporting.results import Cell, Results, Run
from mha_jax.reporting.simulation import ALIKE, BETTER, EFFECT, MARGIN, decide, draw, measured_spreads, one_by_one
from mha_jax.specs import UserError


def made(losses: np.ndarray, batches: list[list[int]]) -> Results:
    """A sweep of finished cells with these losses, [cells, seeds]; claims compare cell 0 with each of the others."""

    def cell(i: int) -> Cell:
        log = [
            {"step": 9, "seed": seed, "split": "validation", "name": "loss", "value": value}
            for seed, value in enumerate(losses[i])
        ]
        return Cell(f"run{i}", {"model.num_heads": i}, (Run(f"run{i}", None, {}, {"state": "done"}, log),))

    return Results({"base": "run0", "batches": batches}, [cell(i) for i in range(len(losses))], [])


@pytest.mark.parametrize("batches", [[[0, 1, 2]], [[0, 1, 2], [3, 4]]])
def test_drawn_sweeps_are_decided_as_real_ones_are(batches):
    rng, n = np.random.default_rng(1), sum(map(len, batches))
    seen = set()
    for _ in range(10):
        losses = 2.0 + 0.02 * rng.standard_normal((4, n)) + 0.06 * rng.integers(0, 3, (4, 1))
        results = made(losses, batches)
        cells = [{"model.num_heads": i} for i in range(4)]
        for claim, real in (
            (BETTER, [claims.Claim("", "validation/loss", cells[0], c) for c in cells[1:]]),
            (ALIKE, [claims.Equivalence("", "validation/loss", (c, cells[0]), MARGIN) for c in cells[1:]]),
        ):
            told = [verdict.status for verdict in claims.check(real, results)]
            assert told == decide(claim, (losses[1:] - losses[0])[None], looks=len(batches))[0].tolist()
            seen |= set(told)
    assert seen == {"held", "not held", "undecided"}


@pytest.mark.parametrize("n", [3, 5, 10])
def test_no_effect_is_called_held_in_at_most_5_percent_of_sweeps(n: int):
    """Of 20,000 sweeps; 2.5 % is known to within 0.3 % (three standard errors)."""
    rng = np.random.default_rng(n)
    single, ten = draw(rng, 20_000, 1, n, 0.024), draw(rng, 20_000, 10, n, 0.024)
    assert np.mean(decide(BETTER, single) == "held") == pytest.approx(0.025, abs=0.0035)
    assert np.mean(decide(ALIKE, single + MARGIN) == "held") < 0.0285
    assert np.mean(np.any(decide(BETTER, ten) == "held", -1)) < 0.0285
    assert np.mean(np.any(one_by_one(BETTER, ten) == "held", -1)) > 0.1, "which is why they are adjusted"


def test_seeds_added_until_a_claim_is_held_keep_the_error_below_5_percent():
    differences = draw(np.random.default_rng(2), 20_000, 2, 10, 0.024)
    looks = [decide(BETTER, differences[:, :, :n], look) for look, n in enumerate(range(3, 11), 1)]
    naive = [decide(BETTER, differences[:, :, :n]) for n in range(3, 11)]
    assert np.mean(np.any([found == "held" for found in looks], axis=(0, 2))) < 0.05
    assert np.mean(np.any([found == "held" for found in naive], axis=(0, 2))) > 0.06, "which is why they are counted"


def test_an_effect_of_table_3_is_found_with_the_power_that_is_computed():
    differences = draw(np.random.default_rng(4), 20_000, 1, 5, 0.0455) + EFFECT
    assert np.mean(decide(BETTER, differences) == "held") == pytest.approx(power(EFFECT, 0.0455, 5), abs=0.01)


def test_spreads_are_those_of_the_differences_from_the_first_run(tmp_path):
    """Differences 1, 2, 3 (s = 1) and 0, 0, 3 (s = sqrt 3)."""
    file = tmp_path / "results.csv"
    values = {"base": (5, 5, 5), "wide": (5, 5, 8), "near": (6, 7, 8)}
    lines = [f"{run},{seed},{v}" for run, row in values.items() for seed, v in enumerate(row)]
    file.write_text("\n".join(["run,seed,validation/loss", *lines]))
    assert measured_spreads(file) == pytest.approx([1.0, math.sqrt(3)])


def test_the_page_is_written_and_what_it_concludes_follows_from_its_rows(tmp_path):
    assert claims_simulation.main(["claims_simulation", f"--out={tmp_path}", "--sweeps=200"]) == 0
    page = (tmp_path / "claims_simulation.md").read_text()
    assert "--sweeps=200" in page and page.count("\n## ") == 6 and "exceeds 5.0 %: " in page
    assert (tmp_path / "claims_simulation.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "claims_simulation.csv").read_text().splitlines()) > 60


def test_what_is_no_results_file_is_told_in_one_line(tmp_path):
    (tmp_path / "one.csv").write_text("run,seed,validation/loss\na,0,1.0\na,1,1.1\n")
    with pytest.raises(UserError, match=r"one\.csv holds no two runs"):
        claims_simulation.main(["x", f"--out={tmp_path}", f"--results={tmp_path / 'one.csv'}"])
    with pytest.raises(UserError, match=r"none\.csv does not exist"):
        claims_simulation.main(["x", f"--out={tmp_path}", f"--results={tmp_path / 'none.csv'}"])
    with pytest.raises(UserError, match="--out is missing"):
        claims_simulation.main(["x"])
