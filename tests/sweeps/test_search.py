"""The search for tuned fields, with trials that only play training: their loss is a function of cell and rate."""

import dataclasses
import json
import math

import pytest

from mha_jax.config import flatten
from mha_jax.specs import UserError
from mha_jax.sweeps import grid, preview
from mha_jax.sweeps.cell import Exit
from mha_jax.sweeps.search import best, limits, propose, search
from mha_jax.sweeps.store import SweepDirectory
from mha_jax.sweeps.trials import Trial, read_trials
from mha_jax.sweeps.tuning import Range, Tuning, parse_tuning
from mha_jax.training.limits import read_limits

RATE = "optimizer.learning_rate"
GRID = {"fields": {RATE: (1e-3, 2e-3, 4e-3)}, "seeds": (3, 4)}
FACTS = {"versions": {}, "commit": None, "devices": {"count": 1}}


def loss(heads, rate, seed):
    """Best at 1e-3 for one head, at 2e-3 for two and at 4e-3 for three; seed 4 is worse by as much everywhere."""
    return 2 + abs(math.log(rate / (1e-3, 2e-3, 4e-3)[heads - 1])) + 0.1 * (seed == 4)


class Play:
    """Stands in for the executor: writes what training would, and counts what it was asked to train."""

    def __init__(self, loss=loss, fails=lambda heads, rate: None, stop_after=math.inf):
        self.loss, self.fails, self.left = loss, fails, stop_after
        self.trained, self.calls = [], 0

    def __call__(self, runs):
        self.calls += 1
        for run in runs:
            if self.left == 0:
                return Exit.STOPPED
            self.left -= 1
            self.trained.append(run.run_id)
            self._train(run, flatten(run.config))
        return Exit.FAILED if any(run.state == "failed" for run in runs) else Exit.DONE

    def _train(self, run, config):
        heads, rate = config["model.num_heads"], config[RATE]
        error = self.fails(heads, rate)
        if error:
            run.update(state="failed", error=error)
            return
        lines = [
            {"step": step, "seed": seed, "split": "validation", "name": "loss", "value": value}
            for seed in config["seeds"]
            for step, value in ((5, 9.0), (11, self.loss(heads, rate, seed)))
        ]
        lines = [{**line, "value": None if math.isnan(line["value"]) else line["value"]} for line in lines]
        (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        run.update(state="done", step=11)


@pytest.fixture
def study(config_file):
    return grid.load(config_file, {"mesh.data": 1})


@pytest.fixture
def tuned(study, tmp_path):
    """Searches for the values of the tiny study's cells: three that are legal, of 1, 2 and 3 heads."""

    def run(play, tuning=GRID):
        wanted = dataclasses.replace(study, tuning=tuning)
        cells = grid.cells(wanted)
        return search(parse_tuning(wanted, cells), cells, tmp_path, play)

    return run


def test_each_cell_gets_the_values_that_are_best_for_it(tuned):
    cells, code = tuned(Play())
    assert code == Exit.DONE
    assert [cell.tuned.get(RATE) for cell in cells] == [1e-3, 2e-3, 4e-3, None]
    assert [cell.config.optimizer.learning_rate for cell in cells[:3]] == [1e-3, 2e-3, 4e-3]
    assert [tuple(cell.config.seeds) for cell in cells[:3]] == [(0, 1)] * 3  # those of the study
    assert [cell.overrides for cell in cells] == [{"model.num_heads": n} for n in (1, 2, 3, 5)]
    assert cells[3].reason.startswith("d_model=12 is not a multiple") and cells[3].untuned is None


def test_all_trials_of_a_grid_are_handed_over_at_once(tuned, tmp_path):
    play = Play()
    tuned(play)
    assert (play.calls, len(play.trained)) == (1, 9)
    trials = read_trials(tmp_path)
    assert [trial.run for trial in trials] == play.trained
    assert [trial.values[RATE] for trial in trials[:3]] == [1e-3, 2e-3, 4e-3]
    configs = [flatten(json.loads((tmp_path / "tuning/runs" / t.run / "config.json").read_text())) for t in trials]
    assert {(tuple(config["seeds"]), config["data.data_dir"]) for config in configs} == {
        ((3, 4), str(tmp_path / ".cache" / "data"))
    }


def test_the_choice_is_by_the_mean_over_the_seeds(tuned):
    def one_seed_is_lucky(heads, rate, seed):
        return {1e-3: 2.0, 2e-3: 1.0 if seed == 3 else 4.0, 4e-3: 2.1}[rate]

    cells, _ = tuned(Play(one_seed_is_lucky))
    assert [cell.tuned[RATE] for cell in cells[:3]] == [1e-3] * 3


def test_of_equals_the_first_of_the_grid_is_chosen(tuned):
    cells, _ = tuned(Play(lambda heads, rate, seed: 2.0), {**GRID, "fields": {RATE: (4e-3, 1e-3, 2e-3)}})
    assert [cell.tuned[RATE] for cell in cells[:3]] == [4e-3] * 3


def test_where_more_is_better_the_largest_is_chosen():
    tuning = Tuning(fields={RATE: (1, 2)}, seeds=(0,), metric="validation/accuracy", trials=2)
    trials = [Trial("c", str(v), {RATE: v}, "done", {11: v / 10}, None) for v in (1, 2)]
    assert best(tuning, trials) is trials[1]


def test_run_again_it_trains_nothing_and_chooses_the_same(tuned):
    first, _ = tuned(Play())
    again = Play()
    second, code = tuned(again)
    assert (again.trained, code) == ([], Exit.DONE)
    assert [cell.run_id for cell in first] == [cell.run_id for cell in second]


def test_stopped_in_its_middle_it_goes_on_with_the_rest(tuned):
    first = Play(stop_after=4)
    cells, code = tuned(first)
    assert code == Exit.STOPPED and all(cell.untuned is None for cell in cells)
    rest = Play()
    cells, code = tuned(rest)
    assert code == Exit.DONE
    assert (len(first.trained), len(rest.trained)) == (4, 5)
    assert not set(first.trained) & set(rest.trained)
    assert [cell.tuned[RATE] for cell in cells[:3]] == [1e-3, 2e-3, 4e-3]


def test_a_wider_grid_keeps_what_was_tried(tuned):
    tuned(Play())
    wider = Play()
    cells, _ = tuned(wider, {**GRID, "fields": {RATE: (5e-4, 1e-3, 2e-3, 4e-3)}})
    assert len(wider.trained) == 3 and all("learning_rate=0.0005" in run for run in wider.trained)
    assert cells[0].tuned == {RATE: 1e-3}


def test_a_trial_that_diverges_loses_and_is_not_trained_again(tuned):
    def high(heads, rate):
        return "NonFiniteLoss: loss is not finite at step 7, seed 3" if rate == 4e-3 else None

    cells, code = tuned(Play(fails=high))
    assert code == Exit.DONE
    assert [cell.tuned[RATE] for cell in cells[:3]] == [1e-3, 2e-3, 2e-3]
    again = Play()
    tuned(again)
    assert again.trained == []


def test_a_trial_that_failed_otherwise_is_tried_again(tuned):
    tuned(Play(fails=lambda heads, rate: "killed by SIGKILL" if rate == 4e-3 else None))
    again = Play()
    cells, _ = tuned(again)
    assert len(again.trained) == 3
    assert cells[2].tuned == {RATE: 4e-3}


def test_a_final_metric_that_is_not_finite_loses(tuned, tmp_path):
    cells, code = tuned(Play(lambda heads, rate, seed: math.nan if rate == 1e-3 and seed == 3 else 2.0))
    assert code == Exit.DONE
    assert [cell.tuned[RATE] for cell in cells[:3]] == [2e-3] * 3
    assert read_trials(tmp_path)[0].lost == "its metric is not finite"


def test_a_cell_without_any_result_is_left_out_with_the_reason(tuned):
    cells, code = tuned(Play(fails=lambda heads, rate: "killed by SIGKILL (out of memory?)" if heads == 3 else None))
    assert code == Exit.FAILED
    assert [cell.reason is None for cell in cells[:3]] == [True, True, False]
    assert cells[2].reason == "none of its 3 trials has a result, the first: killed by SIGKILL (out of memory?)"


def test_a_value_that_a_cell_cannot_have_is_left_out(tuned, tmp_path):
    cells, code = tuned(Play(), {"fields": {"model.num_kv_heads": (1, 2)}})
    assert code == Exit.DONE
    states = {(trial.cell, trial.values["model.num_kv_heads"]): trial for trial in read_trials(tmp_path)}
    refused = states[cells[0].untuned, 2]
    assert refused.state == "illegal" and "num_kv_heads=2" in refused.lost
    assert cells[0].tuned == {"model.num_kv_heads": 1}


def test_a_damaged_status_of_a_trial_is_mended(tuned, tmp_path):
    tuned(Play())
    (tmp_path / "tuning" / "runs" / read_trials(tmp_path)[4].run / "status.json").write_text("{")
    again = Play()
    cells, code = tuned(again)
    assert code == Exit.DONE and len(again.trained) == 1
    assert [cell.tuned[RATE] for cell in cells[:3]] == [1e-3, 2e-3, 4e-3]


OPTUNA = Tuning(fields={RATE: Range(1e-4, 1e-2, True), "model.d_ff": (13, 26)}, seeds=(3,), method="optuna", trials=5)


def told(values, value):
    state, error = ("done", None) if value is not None else ("failed", "loss is not finite")
    return Trial("cell", "run", values, state, {} if value is None else {11: value}, error)


def test_optunas_draws_follow_from_the_results_alone():
    trials = []
    for number in range(5):
        (values,) = propose(OPTUNA, trials)
        assert values == propose(OPTUNA, trials)[0]
        assert 1e-4 <= values[RATE] <= 1e-2 and values["model.d_ff"] in (13, 26)
        trials.append(told(values, None if number == 1 else abs(math.log(values[RATE] / 1e-3))))
    assert propose(OPTUNA, trials) == []
    assert len({trial.values[RATE] for trial in trials}) == 5


def test_optuna_draws_near_what_was_good():
    tuning = Tuning(fields={RATE: Range(1e-4, 1e-2, True)}, seeds=(3,), method="optuna", trials=20)
    trials = []
    while drawn := propose(tuning, trials):
        trials.append(told(drawn[0], abs(math.log(drawn[0][RATE] / 5e-4))))
    random, guided = (sum(trial.value for trial in part) / len(part) for part in (trials[:7], trials[7:]))
    assert guided < 0.6 * random


def test_optuna_gives_each_cell_its_own_draws_in_turn(tuned):
    play = Play()
    tuning = {"method": "optuna", "trials": 3, "fields": {RATE: {"low": 1e-4, "high": 1e-2}}}
    cells, code = tuned(play, tuning)
    assert code == Exit.DONE and (play.calls, len(play.trained)) == (3, 9)
    again = Play()
    assert [c.run_id for c in tuned(again, tuning)[0]] == [c.run_id for c in cells]
    assert again.trained == []


def test_a_trial_has_the_medians_of_those_before_it_as_limits():
    pruning = dataclasses.replace(OPTUNA, prune=True)
    curves = [{5: 9.0, 10: 4.0, 20: 3.0, 30: 2.0}, {5: 8.0, 10: 6.0, 20: 1.0, 30: 1.0}, {5: 7.0, 10: 5.0, 20: 5.0}]
    trials = [Trial("cell", f"run{i}", {}, "done", curve, None) for i, curve in enumerate(curves)]
    assert limits(pruning, trials, steps=30) == {10: 5.0, 20: 3.0}  # none before a third, nor at the end
    assert limits(pruning, trials[:2], steps=30) == {}
    assert limits(OPTUNA, trials, steps=30) == {}


def test_hopeless_trials_are_given_their_limits_and_lose(tuned, tmp_path):
    """The play gives up whatever has limits: of four trials a cell, the last."""

    class Pruned(Play):
        def _train(self, run, config):
            super()._train(run, config)
            if kept := read_limits(run.path):
                run.update(pruned=f"validation loss 9.9 at step 5, limit {kept[5]}")

    tuning = {"method": "optuna", "trials": 4, "prune": True, "fields": {RATE: {"low": 1e-4, "high": 1e-2}}}
    play = Pruned()
    cells, code = tuned(play, tuning)
    trials = [trial for trial in read_trials(tmp_path) if trial.cell == cells[0].untuned]
    assert [trial.state for trial in trials] == ["done", "done", "done", "pruned"]
    assert trials[3].value is None and trials[3].lost == "validation loss 9.9 at step 5, limit 9.0"
    assert code == Exit.DONE and cells[0].tuned == min(trials[:3], key=lambda trial: trial.value).values
    again = Pruned()
    assert tuned(again, tuning)[0] == cells and again.trained == []


def test_a_plan_counts_the_trials_of_the_legal_cells(study):
    wanted = dataclasses.replace(study, tuning=GRID)
    cells = grid.cells(wanted)
    outlook = preview.Outlook("no such device", 1, lambda run: pytest.fail("memory is not asked for"), "")
    told = "before them 3 trials with 2 seeds a cell, of optimizer.learning_rate: 9 runs, 198 steps over all seeds"
    assert preview.search_total(parse_tuning(wanted, cells), cells, outlook) == told


def test_sweep_json_keeps_the_grid_and_the_base_and_tells_what_was_tuned(study, tmp_path):
    wanted = dataclasses.replace(study, tuning=GRID)
    cells = grid.cells(wanted)
    pending = SweepDirectory.create(tmp_path, wanted, cells, FACTS)
    assert pending.runs == []
    chosen, _ = search(parse_tuning(wanted, cells), cells, tmp_path, Play())
    sweep = SweepDirectory.create(tmp_path, wanted, chosen, FACTS)
    facts = sweep.facts
    assert [run.run_id for run in sweep.runs] == [cell["run"] for cell in facts["cells"][:3]]
    assert facts["base"] == facts["cells"][1]["run"] and facts["cells"][1]["untuned"] == cells[1].run_id
    assert [cell["overrides"] for cell in facts["cells"]] == [{"model.num_heads": n} for n in (1, 2, 3, 5)]
    assert facts["cells"][2]["tuned"] == {RATE: 4e-3}
    SweepDirectory.create(tmp_path, wanted, cells, FACTS)  # as the sweep begins again


def test_other_tuned_fields_are_another_sweep_and_more_values_are_not(study, tmp_path):
    wanted = dataclasses.replace(study, tuning=GRID)
    cells = grid.cells(wanted)
    SweepDirectory.create(tmp_path, wanted, cells, FACTS)
    search(parse_tuning(wanted, cells), cells, tmp_path, Play())
    wider = dataclasses.replace(study, tuning={"fields": {RATE: (1e-3, 8e-3)}})
    SweepDirectory.create(tmp_path, wider, cells, FACTS)
    other = dataclasses.replace(study, tuning={"fields": {"model.d_ff": (13, 26)}})
    with pytest.raises(UserError, match=r"tuned fields: \['optimizer.learning_rate'\] -> \['model.d_ff'\]"):
        SweepDirectory.create(tmp_path, other, cells, FACTS)
