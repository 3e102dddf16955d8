"""Every config, profile and cell: resolves, builds, and keeps what it says it holds fixed."""

import dataclasses
from types import ModuleType
from typing import Any

import pytest
from flax import nnx

from configs import default, vaswani2017_table3
from mha_jax import specs
from mha_jax.config import _SECTIONS, flatten, override, resolve
from mha_jax.models import build_model, cost
from mha_jax.specs import ATTENTION_KINDS, UserError
from mha_jax.sweeps import claims, grid

PROFILES = [(default, ""), (default, "smoke"), (vaswani2017_table3, "paper"), (vaswani2017_table3, "multi30k")]
CELLS = [(module, profile, cell) for module, profile in PROFILES for cell in module.get_sweep(profile)]


def run_of(module: ModuleType, profile: str, cell: dict[str, Any]) -> specs.RunSpec:
    return resolve(override(module.get_config(profile), cell))


@pytest.mark.parametrize(("module", "profile", "cell"), CELLS)
def test_every_cell_builds(module: ModuleType, profile: str, cell: dict[str, Any]):
    run = run_of(module, profile, cell)
    # The layers of a cell are alike.
    assert all(len(set(run.model.heads(kind))) == 1 for kind in ATTENTION_KINDS[run.task])
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, num_layers=1))
    model = nnx.eval_shape(lambda: build_model(run, rngs=nnx.Rngs(params=0)))
    sizes = [leaf.size for leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)).leaves]
    assert sum(sizes) == cost.parameters(run)


def test_every_field_of_every_spec_stands_in_the_default_config():
    config = default.get_config()
    for name, spec in _SECTIONS.items():
        assert set(config[name]) == {f.name for f in dataclasses.fields(spec)}, name
    assert set(config) == {f.name for f in dataclasses.fields(specs.RunSpec)}


def test_defaults_that_no_study_sets_agree_with_the_specs():
    flat = flatten(default.get_config())
    for name in ("model", "data", "training", "decoding", "mesh"):
        for field in dataclasses.fields(_SECTIONS[name]):
            if field.default is not dataclasses.MISSING and field.name != "files":
                assert flat[f"{name}.{field.name}"] == field.default, field.name


@pytest.mark.parametrize("profile", ["", "smoke"])
def test_the_default_grid_holds_width_and_parameters_fixed(profile: str):
    runs = [run_of(default, profile, cell) for cell in default.get_sweep(profile)]
    for run in runs:
        for shape in run.model.heads("decoder"):
            assert shape.num_heads * shape.qk_dim == shape.num_heads * shape.v_dim == run.model.d_model
    assert len({cost.parameters(run) for run in runs}) == 1


@pytest.mark.parametrize(("profile", "keys"), [("paper", (32, 16)), ("multi30k", (4,))])
def test_row_a_holds_width_and_parameters_fixed_and_row_b_shrinks_keys_only(profile: str, keys: tuple[int, ...]):
    base, *cells = [run_of(vaswani2017_table3, profile, cell) for cell in vaswani2017_table3.get_sweep(profile)]
    row_a, row_b = cells[: -len(keys)], cells[-len(keys) :]
    width = base.model.d_model
    for run in (base, *row_a):
        for kind in ATTENTION_KINDS["translation"]:
            for shape in run.model.heads(kind):
                assert shape.num_heads * shape.qk_dim == shape.num_heads * shape.v_dim == width
    assert {cost.parameters(run) for run in row_a} == {cost.parameters(base)}
    blocks = 3 * base.model.num_layers
    for run, qk_dim in zip(row_b, keys, strict=True):
        (shape,) = set(run.model.heads("encoder"))
        assert (shape.num_heads, shape.qk_dim, shape.v_dim) == (8, qk_dim, width // 8)
        assert cost.parameters(base) - cost.parameters(run) == blocks * 2 * width * 8 * (width // 8 - qk_dim)


def test_the_papers_parameter_counts():
    """Table 3 prints 65, 58 and 60 million for a vocabulary of "about 37,000": our counts lie within four per cent."""
    counted = [row for row in vaswani2017_table3.get_paper()["rows"] if row["parameters"]]
    assert len(counted) == 3
    for row in counted:
        run = run_of(vaswani2017_table3, "paper", row["cell"])
        assert cost.parameters(run) == pytest.approx(row["parameters"], rel=0.04), row["label"]


@pytest.mark.parametrize(("module", "profile"), [p for p in PROFILES if p[1] != "smoke"])  # smoke has two cells only
def test_claims_name_cells_of_the_sweep(module: ModuleType, profile: str):
    study = grid.load(f"{module.__file__}:{profile}")
    base = flatten(study.config)
    found = [{k: v for k, v in cell.items() if base[k] != v} for cell in study.sweep]
    for claim in map(claims.parse, study.claims):
        wanted = (claim.better, claim.worse) if isinstance(claim, claims.Claim) else claim.between
        assert all({k: v for k, v in cell.items() if base[k] != v} in found for cell in wanted), claim.text


def test_every_cell_of_the_papers_sweep_has_a_row_of_the_paper():
    rows = vaswani2017_table3.get_paper()["rows"]
    assert sorted(map(str, vaswani2017_table3.get_sweep())) == sorted(str(row["cell"]) for row in rows)


@pytest.mark.parametrize(("module", "known"), [(default, "smoke"), (vaswani2017_table3, "multi30k")])
def test_an_unknown_profile_names_the_known_ones(module: ModuleType, known: str):
    with pytest.raises(UserError, match=known):
        module.get_config("papre")


@pytest.mark.parametrize(("module", "profile"), PROFILES)
def test_configs_are_locked(module: ModuleType, profile: str):
    with pytest.raises((AttributeError, KeyError)):
        module.get_config(profile).model.num_heds = 4
