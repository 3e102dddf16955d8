"""configs/jin2024_moh.py and configs/bhojanapalli2020.py: every cell builds and holds fixed what it says."""

import dataclasses
from types import ModuleType
from typing import Any

import pytest
from flax import nnx

from configs import bhojanapalli2020, jin2024_moh
from mha_jax.config import flatten, override, resolve
from mha_jax.models import build_model, cost
from mha_jax.specs import ATTENTION_KINDS, UserError
from mha_jax.sweeps import claims

STUDIES = [(module, profile) for module in (bhojanapalli2020, jin2024_moh) for profile in ("paper", "embedded")]
CELLS = [(module, profile, cell) for module, profile in STUDIES for cell in module.get_sweep(profile)]


def run_of(module: ModuleType, profile: str, cell: dict[str, Any]):
    return resolve(override(module.get_config(profile), cell))


@pytest.mark.parametrize(("module", "profile", "cell"), CELLS)
def test_every_cell_builds(module: ModuleType, profile: str, cell: dict[str, Any]):
    run = run_of(module, profile, cell)
    # The layers of a cell are alike.
    assert all(len(set(run.model.heads(kind))) == 1 for kind in ATTENTION_KINDS[run.task])
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, num_layers=1))
    model = nnx.eval_shape(lambda: build_model(run, rngs=nnx.Rngs(params=0)))
    assert sum(leaf.size for leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)).leaves) == cost.parameters(run)


@pytest.mark.parametrize(("module", "profile"), STUDIES)
def test_claims_and_the_papers_rows_name_cells_of_the_sweep(module: ModuleType, profile: str):
    base = flatten(module.get_config(profile))
    cells = [{k: v for k, v in cell.items() if base[k] != v} for cell in module.get_sweep(profile)]
    for claim in map(claims.parse, module.get_claims(profile)):
        assert isinstance(claim, claims.Claim)
        for wanted in (claim.better, claim.worse):
            assert {k: v for k, v in wanted.items() if base[k] != v} in cells, claim.text
    rows = module.get_paper(profile)["rows"]
    assert [row["cell"] for row in rows] == list(module.get_sweep(profile))


@pytest.mark.parametrize(("profile", "heads"), [("paper", 12), ("embedded", 8)])
def test_moh_cells_use_75_and_50_percent_of_the_heads(profile: str, heads: int):
    plain, most, half, fewer = [run_of(jin2024_moh, profile, cell) for cell in jin2024_moh.get_sweep(profile)]
    assert [run.model.num_heads for run in (plain, most, half, fewer)] == [heads, heads, heads, heads // 2]
    assert [run.model.routing.active / heads for run in (most, half)] == [0.75, 0.5]
    assert cost.flops_per_token(most) > cost.flops_per_token(plain) > cost.active_flops_per_token(most)
    assert fewer.model.heads("decoder")[0].qk_dim == plain.model.heads("decoder")[0].qk_dim


@pytest.mark.parametrize("profile", ["paper", "embedded"])
def test_standard_heads_keep_the_width_and_fixed_heads_their_size(profile: str):
    base, *others = [run_of(bhojanapalli2020, profile, cell) for cell in bhojanapalli2020.get_sweep(profile)]
    standard, fixed = others[: len(others) // 2], others[len(others) // 2 :]
    for run in (base, *standard):
        (shape,) = set(run.model.heads("decoder"))
        assert shape.num_heads * shape.qk_dim == shape.num_heads * shape.v_dim == run.model.d_model
        assert cost.parameters(run) == cost.parameters(base)
    for run in (base, *fixed):
        (shape,) = set(run.model.heads("decoder"))
        assert shape.qk_dim == shape.v_dim == 32
    assert [run.model.num_heads for run in fixed] == [run.model.num_heads for run in standard]


def test_the_first_scaled_heads_are_as_wide_as_the_text_is_long():
    run = run_of(bhojanapalli2020, "embedded", {})
    assert run.model.heads("decoder")[0].qk_dim == run.data.length


@pytest.mark.parametrize("module", [bhojanapalli2020, jin2024_moh])
def test_an_unknown_profile_names_the_known_ones(module: ModuleType):
    with pytest.raises(UserError, match="embedded"):
        module.get_config("papre")
