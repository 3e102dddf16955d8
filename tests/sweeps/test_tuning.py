"""A study's TUNING is understood, or refused in one line before anything is trained."""

import sys
from pathlib import Path

import pytest

from mha_jax.specs import UserError
from mha_jax.sweeps import grid
from mha_jax.sweeps.tuning import Range, parse_tuning

RATES = "'fields': {'optimizer.learning_rate': (1e-3, 2e-3)}"


@pytest.fixture
def tuning_of(config_file):
    def parse(text, overrides=None):
        with Path(config_file).open("a") as file:
            file.write(f"\nTUNING = {text}\n")
        study = grid.load(config_file, overrides)
        return parse_tuning(study, grid.cells(study))

    return parse


def test_a_study_without_it_tunes_nothing(config_file):
    study = grid.load(config_file)
    assert parse_tuning(study, grid.cells(study)) is None


def test_a_grid_tries_every_combination_with_the_first_seed_of_the_study(tuning_of):
    tuning = tuning_of("{'fields': {'optimizer.learning_rate': [1e-3, 2e-3], 'model.dropout_rate': (0.0, 0.1, 0.2)}}")
    assert (tuning.metric, tuning.seeds, tuning.trials, tuning.sign) == ("validation/loss", (0,), 6, 1)
    points = [tuple(values.values()) for values in tuning.combinations()]
    assert points == [(1e-3, 0.0), (1e-3, 0.1), (1e-3, 0.2), (2e-3, 0.0), (2e-3, 0.1), (2e-3, 0.2)]


def test_optuna_draws_from_ranges_and_choices(tuning_of):
    rates = "'optimizer.learning_rate': {'low': 1e-4, 'high': 1e-2, 'log': True}"
    tuning = tuning_of(f"{{'method': 'optuna', 'trials': 7, 'fields': {{{rates}, 'model.d_ff': (13, 26)}}}}")
    assert tuning.fields == {"optimizer.learning_rate": Range(1e-4, 1e-2, True), "model.d_ff": (13, 26)}
    assert tuning.trials == 7


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"{{{RATES}, 'budget': 3}}", "has 'budget'; it may set fields, seeds, metric"),
        ("{'metric': 'validation/loss'}", "fields=None must name at least one"),
        ("{'fields': {'optimizer.learning_rat': (1, 2)}}", "did you mean 'optimizer.learning_rate'"),
        ("{'fields': {'model.num_heads': (1, 2)}}", "'model.num_heads' is set by the sweep's own cells"),
        ("{'fields': {'seeds': ((0,), (1,))}}", "'seeds' is no hyperparameter"),
        ("{'fields': {'mesh.data': (1, 2)}}", "'mesh.data' is no hyperparameter"),
        ("{'fields': {'optimizer.learning_rate': ()}}", "must be a tuple of values to try"),
        ("{'fields': {'optimizer.learning_rate': 1e-3}}", "must be a tuple of values to try"),
        ("{'fields': {'optimizer.learning_rate': (1e-3, 1e-3)}}", "has a value twice"),
        ("{'fields': {'optimizer.learning_rate': (1e-3, -1.0)}}", "learning_rate=-1.0 must be positive"),
        ("{'fields': {'optimizer.learning_rate': {'low': 1, 'high': 2}}}", "needs method='optuna'"),
        (f"{{{RATES}, 'metric': 'test/loss'}}", "would tune on the test split; use 'validation/loss'"),
        (f"{{{RATES}, 'metric': 'train/loss'}}", "must be of the validation split"),
        (f"{{{RATES}, 'metric': 'validation/entropy'}}", "'validation/entropy' has no direction"),
        (f"{{{RATES}, 'metric': 'validation/bleu'}}", "is measured for task='translation'; this is task='lm'"),
        (f"{{{RATES}, 'seeds': (0, 0)}}", r"seeds=\(0, 0\) must be distinct integers"),
        (f"{{{RATES}, 'seeds': (2**31,)}}", "distinct integers from 0 to 2147483647"),
        ("['optimizer.learning_rate']", "TUNING=.* must be a dict"),
        (f"{{{RATES}, 'seeds': 3}}", "seeds=3 must be distinct integers"),
        (f"{{{RATES}, 'trials': 5}}", "trials=5 is for method='optuna'"),
        (f"{{{RATES}, 'method': 'random'}}", "method='random' is not one of 'grid', 'optuna'"),
        (f"{{{RATES}, 'method': 'optuna'}}", "trials=None must be an integer of at least 1"),
        (f"{{{RATES}, 'prune': True}}", "it needs method='optuna' and metric='validation/loss', not 'grid'"),
        (f"{{{RATES}, 'prune': 1}}", "prune=1 must be True or False"),
    ],
)
def test_a_mistake_is_told_in_one_line(tuning_of, text, told):
    with pytest.raises(UserError, match=told) as caught:
        tuning_of(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ends", "told"),
    [
        ("{'low': 1e-2, 'high': 1e-3}", "needs numbers low < high"),
        ("{'low': 0.0, 'high': 1e-3, 'log': True}", "above 0 for log=True"),
        ("{'low': 1e-3}", "must give low, high"),
        ("{'low': 1e-3, 'high': 1e-2, 'step': 2}", "must give low, high"),
    ],
)
def test_a_range_that_cannot_be_drawn_from_is_refused(tuning_of, ends, told):
    with pytest.raises(UserError, match=told):
        tuning_of(f"{{'method': 'optuna', 'trials': 3, 'fields': {{'optimizer.learning_rate': {ends}}}}}")


def test_a_value_that_some_cells_cannot_have_is_no_mistake(tuning_of):
    """Of 1, 2 and 3 heads, two key/value heads fit the second only."""
    assert tuning_of("{'fields': {'model.num_kv_heads': (1, 2)}}").trials == 2


def test_optuna_that_is_not_there_is_told_with_what_installs_it(tuning_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"needs Optuna: pip install -r requirements-optuna.txt"):
        tuning_of(f"{{{RATES}, 'method': 'optuna', 'trials': 2}}")
