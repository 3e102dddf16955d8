"""What was found about heads as JSON, rows, tables and pictures."""

import json

import numpy as np
import pytest
from etils import epath

from mha_jax.heads.coreference import Antecedents
from mha_jax.heads.intervals import Estimate
from mha_jax.heads.reading import Found
from mha_jax.heads.relations import Relation
from mha_jax.heads.roles import RoleTable, Thresholds
from mha_jax.heads.shapes import SHAPES
from mha_jax.heads.similarity import Head
from mha_jax.reporting.formats import aligned
from mha_jax.reporting.heads import write_page
from mha_jax.reporting.roles import SeedFound, draw, flat_rows, record, rows, tables
from mha_jax.sweeps.store import write_json

NAME = "encoder/0/attention"
FACTS = {"run": "tiny", "step": 20, "split": "validation", "left_out": {}}


def heads(previous):
    """Three heads: one scores as given on the previous token, one is broad, one has no role."""
    mean = {"previous": np.array([previous, 0.1, 0.1]), "next": np.full(3, np.nan), "broad": np.array([0.2, 0.99, 0.5])}
    low, high = ({role: x + shift for role, x in mean.items()} for shift in (-0.01, 0.01))
    chance = {"previous": np.full(3, 0.1), "next": np.full(3, np.nan), "broad": np.ones(3)}
    share = np.tile(np.eye(5)[1], (3, 1))
    even = np.tile(np.eye(5)[4], (3, 1))
    return {NAME: Found(RoleTable(mean, low, high, chance), Estimate(share, share, share), even, 7)}


def relation(direction, best, gain, head=2):
    accuracy, baseline = Estimate(0.5, 0.45, 0.55), Estimate(0.5 - gain, 0.3, 0.4)
    between = Estimate(gain, gain - 0.05, gain + 0.05)
    return Relation("det", direction, Head(NAME, head), 3, accuracy, 1, baseline, between, 0.1, 40, 41, 2, best)


@pytest.fixture(scope="module")
def told():
    antecedent = Antecedents("all", "nearest", 1, Estimate(0.3, 0.2, 0.4), None, 30)
    found = {
        0: SeedFound(heads(0.95), [relation("dependent", True, 0.2), relation("head", False, 0.3, 1)], [antecedent]),
        1: SeedFound(heads(0.5), [relation("dependent", True, 0.05)], []),
    }
    return json.loads(json.dumps(record(found, Thresholds(), FACTS)))


def test_record_names_roles_and_what_is_syntactic(told):
    first, second = (told["seeds"][seed]["attentions"][NAME] for seed in "01")
    assert first["role"] == ["previous", "broad", "syntactic"] and second["role"] == [None, "broad", None]
    assert first["roles"] == [["previous"], ["broad"], ["syntactic"]]
    assert first["nearest"] == ["previous", None, None] and second["nearest"] == ["previous", None, None]
    assert second["strength"] == second["strength_elsewhere"] == [pytest.approx(0.4 / 0.9, abs=1e-6), 0, 0]
    assert first["scores"]["previous"]["low"] == [0.94, 0.09, 0.09]
    assert first["scores"]["next"]["mean"] == [None] * 3
    assert first["shapes"]["diagonal"]["mean"] == [1, 1, 1] and first["shapes"]["heterogeneous"]["even"] == 1
    assert told["seed_counts"] == {NAME: {"previous": [1, 0], "syntactic": [1, 0], "broad": [1, 1]}}
    assert told["thresholds"]["positional"] == 0.9


def test_rows_have_a_line_a_head_and_a_relation(told):
    body = rows(told)
    assert len(body) == 6 and body[0]["previous"] == 0.95 and body[0]["previous chance"] == 0.1
    assert [row["role"] for row in body[:3]] == ["previous", "broad", "syntactic"]
    assert [(row["nearest"], row["strength"]) for row in body[3:5]] == [("previous", 0.444444), (None, 0)]
    assert {f"share {shape}" for shape in SHAPES} <= body[0].keys()
    relations = flat_rows(told, "relations")
    assert [(row["seed"], row["direction"], row["gain"]) for row in relations] == [
        ("0", "dependent", 0.2), ("0", "head", 0.3), ("1", "dependent", 0.05)
    ]  # fmt: skip
    assert relations[0]["accuracy low"] == 0.45 and relations[0]["head"] == f"{NAME}:2"


def test_lines_tell_the_best_direction_with_its_interval(told):
    text = "\n".join(aligned(tables(told)))
    row = next(line for line in text.split("\n") if line.startswith("det"))
    assert row.split()[:5] == ["det", "40", "2", "dependent", f"{NAME}:2"]
    assert "50.0 (45.0 to 55.0)" in row and "+20.0 (+15.0 to +25.0)" in row
    assert "nearest" in text and "How many of the 3 heads" in text
    [row] = [line for line in text.split("\n") if line.startswith("previous")]
    assert row.split() == ["previous", f"{NAME}:0", "95.0", "(94.0", "to", "96.0)", "10.0", "90"]


def test_page_has_tables_and_pictures(make_sweep, told):
    run = make_sweep("configs/default.py", {0: [1.6, 1.7, 1.8]}).runs[0]
    directory = epath.Path(run.path / "heads")
    write_json(directory / "roles.json", told)
    draw(told, "tiny", directory)
    assert {path.name for path in directory.iterdir()} == {
        "roles.json", "roles.svg", "roles.png", "relations.svg", "relations.png"
    }  # fmt: skip
    text = write_page(run.path).read_text()
    assert text.count("<svg ") == 2 and "What each head does" in text and "Which dependencies heads find" in text
    assert "50.0 (45.0 to 55.0)" in text
