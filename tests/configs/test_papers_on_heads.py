"""configs/clark2019.py and configs/kovaleva2019.py: profiles, the paper's numbers, claims that are understood."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from configs import clark2019, kovaleva2019
from mha_jax.config import resolve
from mha_jax.reporting.cuts import check_cuts
from mha_jax.specs import UserError
from mha_jax.sweeps import grid

PAPERS = Path(__file__).parents[3] / "shared" / "papers"


@pytest.mark.parametrize("module", [clark2019, kovaleva2019])
def test_profiles_are_masked_language_models(module: ModuleType):
    small, paper = (resolve(module.get_config(profile)) for profile in ("small", "paper"))
    assert small.task == paper.task == "masked_lm"
    assert (small.model.num_layers, small.model.num_heads) == (2, 8)
    assert (paper.model.num_layers, paper.model.num_heads, paper.model.d_model) == (12, 12, 768)
    with pytest.raises(UserError, match="unknown profile 'big'"):
        module.get_config("big")


@pytest.mark.parametrize("name", ["clark2019", "kovaleva2019"])
def test_claims_are_understood_and_undecided_without_files(tmp_path: Path, name: str):
    study = grid.load(f"configs/{name}.py:small")
    verdicts = check_cuts(study.cuts, tmp_path)
    assert len(verdicts) >= 3 and {verdict.status for verdict in verdicts} == {"undecided"}


def test_claims_on_relations_hold_for_numbers_as_in_the_paper(tmp_path: Path):
    universal = {"All": "All", "det": "det", "nsubj": "nsubj", "dobj": "obj", "advmod": "advmod", "mark": "mark"}
    rows = [
        {"relation": other, "best": True, "accuracy": {"mean": accuracy / 100}, "baseline": {"mean": baseline / 100}}
        for name, other in universal.items()
        for _, accuracy, baseline, _ in [clark2019.RELATIONS[name]]
    ]
    seeds = {str(seed): {"relations": rows, "attentions": {}} for seed in range(2)}
    (tmp_path / "roles.json").write_text(json.dumps({"seeds": seeds}))
    scores = {"probe": 61, "best_head": 34.5, "right_branching": 26}
    graph = {part: {"mean": score / 100} for part, score in scores.items()}
    probes = {str(seed): {"tasks": {}, "graph": graph} for seed in range(2)}
    (tmp_path / "probes.json").write_text(json.dumps({"seeds": probes}))
    assert {verdict.status for verdict in check_cuts(clark2019.get_cuts(), tmp_path)} == {"held"}


def test_numbers_of_clark_are_those_of_the_paper():
    file = PAPERS / "clark2019.json"
    if not file.exists():
        pytest.skip("clark2019.json is not in ../shared/papers beside the clone")
    rows = json.loads(file.read_text())["rows"]
    found = {row["relation"]: (row["head"], row["accuracy"], row["baseline"], row["baseline_offset"]) for row in rows}
    assert found == clark2019.RELATIONS
    parsers = json.loads(file.read_text())["extra_tables"][0]["rows"]
    assert [row["uas"] for row in parsers] == list(clark2019.PARSERS.values())
