"""Seeds are added to a sweep as further runs; what was trained stays as it is."""

import json
from pathlib import Path

import pytest

from mha_jax import config as configs
from mha_jax.specs import UserError
from mha_jax.sweeps import grid, seeds
from mha_jax.sweeps.store import RunDirectory, SweepDirectory

FACTS = {"versions": {"jax": "0"}, "commit": None, "devices": {"count": 1}}


def make(config_file, workdir, more=(), overrides=None):
    study = grid.load(config_file, overrides)
    return SweepDirectory.create(workdir, study, grid.cells(study), FACTS, more)


@pytest.fixture
def begun(config_file, tmp_path):
    """A sweep of seeds 0 and 1 whose runs have all been trained."""
    sweep = make(config_file, tmp_path / "w")
    for run in sweep.runs:
        (run.path / "metrics.jsonl").write_text(f"{run.run_id}\n")
        run.update(state="done", step=11)
    return sweep


def files(sweep):
    return {path: path.read_bytes() for path in Path(sweep.path, "runs").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("3..9", (3, 4, 5, 6, 7, 8, 9)), ("3,5,8", (3, 5, 8)), ("0..2, 7", (0, 1, 2, 7)), ("4", (4,)), ("6..6", (6,))],
)
def test_seeds_are_read_and_told_alike(text, wanted):
    assert seeds.parse(text) == wanted
    assert seeds.parse(seeds.in_words(wanted)) == wanted


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "'' is no seed"),
        ("3..", "'3..' is no seed"),
        ("-1", "'-1' is no seed"),
        ("1.5", "'1.5' is no seed"),
        ("three", "'three' is no seed"),
        ("9..3", "runs backwards; give 3..9"),
        ("3,4,3", "seed 3 is there twice"),
        ("0..99999999", "at most 1000"),
        ("2147483648", "is too large; seeds are from 0 to 2147483647"),
    ],
)
def test_what_is_no_seed_is_told_in_one_line(text, told):
    with pytest.raises(UserError, match=rf"^--seeds={text}: ") as caught:
        seeds.parse(text)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_every_legal_cell_gets_a_run_of_its_own_config_but_the_seeds(config_file, begun):
    before = files(begun)
    old = begun.runs
    sweep = make(config_file, begun.path, more=(5, 6, 7))
    new = sweep.runs[3:]
    assert [run.run_id for run in sweep.runs[:3]] == [run.run_id for run in old]
    for run, origin in zip(new, old, strict=True):
        assert configs.diff(origin.config, run.config) == ["seeds: [0, 1] -> [5, 6, 7]"]
        assert run.state == "queued" and "seeds=5..7" in run.run_id
        assert run.run_id.endswith(configs.config_hash(run.config))
    assert {path: text for path, text in files(sweep).items() if path in before} == before
    facts = sweep.facts
    assert facts["batches"] == [[0, 1], [5, 6, 7]]
    assert [cell["added"] for cell in facts["cells"][:3]] == [[run.run_id] for run in new]


def test_seeds_that_are_there_are_left_alone(config_file, begun):
    make(config_file, begun.path, more=(0, 1, 2))
    sweep = make(config_file, begun.path, more=(1, 2, 3))
    assert sweep.facts["batches"] == [[0, 1], [2], [3]]
    again = make(config_file, begun.path, more=(0, 3))
    assert again.facts == sweep.facts and len(again.runs) == 9


def test_a_sweep_that_is_opened_again_remembers_what_was_added(config_file, begun):
    ids = [run.run_id for run in make(config_file, begun.path, more=(2, 3)).runs]
    assert [run.run_id for run in make(config_file, begun.path).runs] == ids


def test_runs_tell_the_seeds_where_sweep_json_was_lost(config_file, begun):
    ids = [run.run_id for run in make(config_file, begun.path, more=(2, 3)).runs]
    RunDirectory.create(begun.run_path("another"), grid.load(config_file, {"seeds": (8,), "training.steps": 7}).config)
    (begun.path / "sweep.json").unlink()
    assert [run.run_id for run in make(config_file, begun.path).runs] == ids


def test_seeds_can_be_added_where_sweep_json_is_damaged_or_lost(config_file, begun):
    make(config_file, begun.path, more=(2, 3))
    # The config may say other seeds by now: those that the sweep began with are the ones of its runs.
    cells = grid.cells(grid.load(config_file, {"seeds": (5,)}))
    (begun.path / "sweep.json").write_text("{")
    assert SweepDirectory(begun.path).seeds_there(cells) == [(0, 1), (2, 3)]
    (begun.path / "sweep.json").unlink()
    assert SweepDirectory(begun.path).seeds_there(cells) == [(0, 1), (2, 3)]


def test_a_config_with_more_seeds_is_pointed_to_the_flag(config_file, begun):
    before = (begun.path / "sweep.json").read_text()
    with pytest.raises(UserError, match=r"holds this sweep with seeds 0,1, .* add others, give --seeds=2\.\.4$"):
        make(config_file, begun.path, overrides={"seeds": (0, 1, 2, 3, 4)})
    with pytest.raises(UserError, match=r"with seeds 0,1, and the config says 4; to go on, give --seeds=0,1$"):
        make(config_file, begun.path, overrides={"seeds": (4,)})
    assert (begun.path / "sweep.json").read_text() == before


def test_cells_that_set_their_seeds_take_no_others(config_file):
    cells = grid.cells(grid.load(config_file))
    cells[1].overrides["seeds"] = (4,)
    with pytest.raises(UserError, match="its cells set their seeds themselves"):
        seeds.with_seeds(cells, (5,))


def test_seeds_that_do_not_fit_the_devices_are_refused_before_anything_is_written(config_file, tmp_path):
    sweep = make(config_file, tmp_path / "w", overrides={"mesh.seed": 2})
    (sweep.runs[0].path / "metrics.jsonl").touch()
    before = json.loads((sweep.path / "sweep.json").read_text())
    with pytest.raises(UserError, match=r"3 seeds do not split over mesh\.seed=2"):
        make(config_file, sweep.path, more=(2, 3, 4), overrides={"mesh.seed": 2})
    assert sweep.facts == before and len(list((sweep.path / "runs").iterdir())) == 3
