"""The study of gates: every cell builds, and its numbers are the paper's."""

import dataclasses
import json
import os

import pytest
from flax import nnx

from configs import michel2019, voita2019
from mha_jax import config as configs
from mha_jax.config import flatten, override, resolve
from mha_jax.models import build_model, cost
from mha_jax.specs import UserError
from mha_jax.sweeps import claims, grid

PAPERS = "../shared/papers/voita2019.json"
PROFILES = ("paper", "paper_base", "multi30k")


def runs(profile):
    return [resolve(override(voita2019.get_config(profile), cell)) for cell in voita2019.get_sweep(profile)]


@pytest.mark.parametrize("profile", [pytest.param("paper", marks=pytest.mark.slow), "multi30k"])
def test_one_model_of_each_kind_of_cell_builds(profile):
    # Cells that differ in l0_weight alone build the same model.
    for run in {(run.gates.kind, run.model.num_heads): run for run in runs(profile)}.values():
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, num_layers=1))
        model = nnx.eval_shape(lambda run=run: build_model(run, rngs=nnx.Rngs(params=0)))
        assert sum(leaf.size for leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)).leaves) == cost.parameters(run)


@pytest.mark.parametrize("profile", ["paper", "multi30k"])
def test_gated_cells_start_from_the_trained_model_and_the_others_get_as_many_steps(profile):
    base, *cells = runs(profile)
    gated = [run for run in cells if run.gates.kind == "hard_concrete"]
    assert len(gated) >= 5 and len({run.gates.l0_weight for run in gated}) == len(gated)
    assert {run.training.start_from for run in gated} == {base.training.start_from} != {None}
    scratch = [run for run in cells if run.gates.kind == "none"]
    first = resolve(michel2019.get_config("multi30k") if profile == "multi30k" else voita2019.get_config("paper_base"))
    for run in scratch:
        assert run.training.start_from is None and run.optimizer == first.optimizer
        assert run.training.steps == base.training.steps + first.training.steps
        assert {(s.qk_dim, s.v_dim) for s in run.model.heads("cross")} == {(base.model.d_model // 8,) * 2}


def test_the_parent_of_each_profile_is_the_run_that_its_command_trains():
    parents = {"multi30k": michel2019.get_config("multi30k"), "paper": voita2019.get_config("paper_base")}
    for profile, parent in parents.items():
        name = voita2019.get_config(profile).training.start_from.rsplit("/", 1)[-1]
        assert name == configs.run_id(parent, {})


@pytest.mark.parametrize("profile", PROFILES)
def test_claims_and_rows_of_the_paper_name_cells_of_the_sweep(profile):
    study = grid.load(f"{voita2019.__file__}:{profile}")
    base = flatten(study.config)
    found = [{k: v for k, v in cell.items() if base[k] != v} for cell in study.sweep]
    wanted = [row["cell"] for row in voita2019.get_paper(profile)["rows"]]
    for claim in map(claims.parse, study.claims):
        assert isinstance(claim, claims.Claim)
        wanted += [claim.better, claim.worse]
    assert all({k: v for k, v in cell.items() if base[k] != v} in found for cell in wanted)


def test_numbers_are_those_of_table_2():
    if not os.path.exists(PAPERS):
        pytest.skip(f"{PAPERS} is not here: the paper's numbers cannot be compared")
    with open(PAPERS) as file:
        table = [row for row in json.load(file)["rows"] if row["dataset"] == "WMT"]
    scratch = {row["heads_total"]: row["bleu_from_scratch"] for row in table}
    printed = [row["validation/bleu"] for row in voita2019.get_paper()["rows"] if "validation/bleu" in row]
    assert printed == [scratch[heads] for heads in (144, 75, 58, 36)]
    source = voita2019.get_paper()["source"]
    trained = {row["heads_total"]: row["bleu_from_trained"] for row in table[1:]}
    assert all(f"{bleu:.2f} with {heads}" in source for heads, bleu in trained.items())


def test_an_unknown_profile_names_the_known_ones():
    with pytest.raises(UserError, match="multi30k"):
        voita2019.get_config("papre")
