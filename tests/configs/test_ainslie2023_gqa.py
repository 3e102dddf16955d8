"""The grouped-query study varies the decoder's key/value heads and nothing else."""

import dataclasses
from typing import Any

import pytest
from flax import nnx

from configs import ainslie2023_gqa as study
from mha_jax.config import override, resolve
from mha_jax.models import build_model, cost
from mha_jax.specs import RunSpec, UserError
from mha_jax.sweeps import claims

PROFILES = {"paper": (64, (64, 8, 1)), "multi30k": (8, (8, 4, 2, 1))}


def runs(profile: str) -> list[RunSpec]:
    return [resolve(override(study.get_config(profile), cell)) for cell in study.get_sweep(profile)]


@pytest.mark.parametrize("profile", PROFILES)
def test_only_the_decoders_keys_and_values_shrink(profile: str):
    heads, groups = PROFILES[profile]
    base, *_ = found = runs(profile)
    for run, count in zip(found, groups, strict=True):
        assert {(s.num_heads, s.num_kv_heads) for s in run.model.heads("encoder")} == {(heads, heads)}
        for kind in ("decoder", "cross"):
            assert {(s.num_heads, s.num_kv_heads) for s in run.model.heads(kind)} == {(heads, count)}
            assert run.model.heads(kind)[0].v_dim == base.model.heads(kind)[0].v_dim
        # Two attentions a layer, each with a key and a value kernel of [d_model, G, width].
        gone = (
            2 * base.model.num_layers * 2 * base.model.d_model * (heads - count) * base.model.heads("decoder")[0].v_dim
        )
        assert cost.parameters(base) - cost.parameters(run) == gone


@pytest.mark.slow
def test_every_scaled_cell_builds():
    for run in runs("multi30k"):
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, num_layers=1))
        model = nnx.eval_shape(lambda run=run: build_model(run, rngs=nnx.Rngs(params=0)))
        assert sum(leaf.size for leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)).leaves) == cost.parameters(run)


@pytest.mark.parametrize("profile", PROFILES)
def test_claims_and_the_papers_rows_name_cells_of_the_sweep(profile: str):
    cells: list[dict[str, Any]] = list(study.get_sweep(profile))
    assert all(row["cell"] in cells for row in study.get_paper(profile)["rows"])
    for claim in map(claims.parse, study.get_claims(profile)):
        wanted = (claim.better, claim.worse) if isinstance(claim, claims.Claim) else claim.between
        assert all(cell in cells for cell in wanted)


def test_an_unknown_profile_names_the_known_ones():
    with pytest.raises(UserError, match="known are 'paper' and 'multi30k'"):
        study.get_config("papre")
