"""Config files become cells; every mistake in one is told in one line."""

from pathlib import Path

import pytest

from mha_jax.config import config_hash, flatten
from mha_jax.specs import UserError
from mha_jax.sweeps import grid


def edited(config_file, old, new):
    text = Path(config_file).read_text()
    assert old in text
    Path(config_file).write_text(text.replace(old, new))
    return config_file


def test_every_cell_is_named_and_the_illegal_one_keeps_its_reason(config_file):
    cells = grid.cells(grid.load(config_file))
    assert [cell.overrides["model.num_heads"] for cell in cells] == [1, 2, 3, 5]
    assert [cell.reason is None for cell in cells] == [True, True, True, False]
    assert "d_model=12 is not a multiple of num_heads=5; 1, 2, 3, 4, 6 and 12 fit" in cells[3].reason
    assert cells[0].run_id == f"tiny-num_heads=1-{config_hash(cells[0].config)}"
    assert len({cell.run_id for cell in cells}) == 4


def test_profile_is_passed_on(config_file):
    study = grid.load(config_file + ":wide")
    assert (study.profile, study.config.model.d_model) == ("wide", 22)


def test_overrides_apply_below_the_cells(config_file):
    study = grid.load(config_file, {"model.num_heads": 6, "training.steps": 3})
    cells = grid.cells(study)
    assert study.config.model.num_heads == 6
    assert [cell.run.training.steps for cell in cells[:3]] == [3, 3, 3]
    assert [cell.config.model.num_heads for cell in cells] == [1, 2, 3, 5]


def test_base_is_the_cell_that_equals_the_config_or_else_the_first_legal_one(config_file):
    study = grid.load(config_file)
    cells = grid.cells(study)
    assert grid.base_run_id(study, cells) == cells[1].run_id
    elsewhere = grid.load(edited(config_file, "(1, 2, 3, 5)", "(5, 3, 1)"))
    cells = grid.cells(elsewhere)
    assert grid.base_run_id(elsewhere, cells) == cells[1].run_id


def test_match_takes_the_head_shape_of_the_base_config(config_file):
    edited(config_file, "(1, 2, 3, 5)", "(1, 3)")
    study = grid.load(config_file, {"model.match": "params"})
    wanted = {"num_heads": 2, "num_kv_heads": None, "qk_dim": None, "v_dim": None}
    assert study.config.model.match_base.to_dict() == wanted
    assert all(cell.config.model.match_base.to_dict() == wanted for cell in grid.cells(study))


def test_match_that_a_cell_alone_asks_for_is_filled_in_too(config_file):
    edited(config_file, 'yield {"model.num_heads": num_heads}', 'yield {"model.num_heads": 1, "model.match": "flops"}')
    edited(config_file, "(1, 2, 3, 5)", "(0,)")
    (cell,) = grid.cells(grid.load(config_file))
    assert cell.config.model.match_base.num_heads == 2


def test_the_same_run_twice_is_refused(config_file):
    edited(config_file, "(1, 2, 3, 5)", "(1, 2, 1)")
    with pytest.raises(UserError, match="are the same run"):
        grid.cells(grid.load(config_file))


def test_no_legal_cell_is_the_users_mistake(config_file):
    edited(config_file, "(1, 2, 3, 5)", "(5, 7)")
    with pytest.raises(UserError, match=r"num_heads=5.*no cell of"):
        grid.cells(grid.load(config_file))


def test_cells_that_do_not_divide_over_the_devices_are_illegal(config_file):
    study = grid.load(config_file, {"data.batch_size": 5})
    with pytest.raises(UserError, match="batch_size=5 is not a multiple of 2 data devices"):
        grid.cells(study, num_devices=2)
    assert grid.cells(study, num_devices=5)[0].reason is None


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("return config.lock()", "return config.nothing", "AttributeError"),
        ("return config.lock()", "return 3", r"returned int, not a ConfigDict"),
        ("def get_config", "def get_confg", r"has no get_config\(\)"),
        ("for num_heads in", "for num_heads", r"tiny.py, line 23: SyntaxError: "),
        ('"model.num_heads": num_heads', '"model.num_heds": num_heads', "did you mean 'model.num_heads'"),
        ("for num_heads in (1, 2, 3, 5)", "for num_heads in ()", "gave no cells"),
        (
            "    for num_heads in (1, 2, 3, 5):\n        yield",
            "    return None and",
            "its sweep must be a list of dicts",
        ),
        ("yield {", "yield 3 or {", "its sweep must be a list of dicts; 3 is no dict"),
        ("PAPER =", "import sys\nsys.exit('no')\nPAPER =", "tiny.py, line 28: SystemExit: no"),
        ('PAPER = {"rows"', 'PAPER = "rows" or {"rows"', "PAPER='rows' must be a dict"),
        ('"cell": {}}]', '"sell": {}}]', "PAPER: row .* must be a dict with a 'cell'"),
        (
            "CLAIMS = [",
            "CLAIMS = ['one is worse'] or [",
            "its claims must be a list of dicts; 'one is worse' is no dict",
        ),
        ('"worse"', '"wrose"', "claim '2 beat 1': .*argument"),
        ("seeds=(0, 1)", "seeds=(0, 2**31)", "must be integers from 0 to 2147483647"),
    ],
)
def test_a_faulty_file_is_told_in_one_line(config_file, old, new, told):
    edited(config_file, old, new)
    with pytest.raises(UserError, match=told) as caught:
        grid.cells(grid.load(config_file))
    assert "\n" not in str(caught.value)


def test_the_line_of_an_exception_is_told(config_file):
    with pytest.raises(UserError, match=r"tiny.py, line \d+: KeyError: 'narrow'"):
        grid.load(config_file + ":narrow")


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(UserError, match=r"config file '.*nope.py' does not exist"):
        grid.load(str(tmp_path / "nope.py"))


def test_a_profile_of_a_file_without_profiles_is_refused(config_file):
    edited(config_file, 'def get_config(profile=""):', 'def get_config():\n    profile = ""')
    with pytest.raises(UserError, match="has no profiles; 'wide' was asked for"):
        grid.load(config_file + ":wide")


def test_a_file_without_a_sweep_is_one_cell(config_file):
    edited(config_file, "def get_sweep", "def _unused")
    (cell,) = grid.cells(grid.load(config_file))
    assert cell.overrides == {}
    assert flatten(cell.config)["model.num_heads"] == 2
