"""The page of a run's heads shows what is there, stands alone, and is linked from the report of the sweep."""

import json

import numpy as np
import pytest

from mha_jax.heads.matching import match_layers
from mha_jax.heads.redundancy import CUTS, Effect, Measured, Suggestion, Twins
from mha_jax.heads.similarity import Head, Pairs
from mha_jax.reporting import build_report
from mha_jax.reporting.heads import write_page
from mha_jax.reporting.redundancy import draw, lines, record, rows, within_layers
from mha_jax.specs import UserError
from mha_jax.sweeps.store import write_json
from tests.reporting.test_report import Tags

HEADS = tuple(Head(f"decoder/{layer}/attention", h) for layer in range(2) for h in range(3))
FACTS = {"run": "tiny", "seed": 0, "step": 20, "split": "validation", "found_by": "cka", "other": None}
FACTS |= {"batches": [2, 2], "held_out": True}
CUT = {"cka": CUTS["cka"], "weights": CUTS["weights"]}


def found():
    """Heads 0 and 4 are alike by CKA, the others by nothing."""
    value = np.eye(6)
    value[0, 4] = value[4, 0] = 0.95
    error = np.full((6, 6), 0.01)
    cka, weights = Pairs("cka", HEADS, HEADS, value, error), Pairs("weights", HEADS, HEADS, np.eye(6), None)
    return {"decoder": {"cka": cka, "weights": weights}}


def told():
    twins = Twins(HEADS[4], HEADS[0], 0.05, True, None, None)
    near = Twins(HEADS[2], HEADS[1], 0.9, False, 0.2, 0.5)
    suggestions = [
        Suggestion(twins, Effect(0.01, 0.002), None),
        Suggestion(near, Effect(0.3, 0.01), Effect(0.2, 0.01)),
    ]
    measured = Measured(suggestions, Effect(0.01, 0.002), Effect(0.05, 0.01))
    return record(found(), CUT, measured, match_layers(found()), FACTS)


@pytest.fixture
def run(make_sweep):
    """A finished run of a sweep, in which redundancy was looked into."""
    run = make_sweep("configs/default.py", {0: [1.6, 1.7, 1.8]}).runs[0]
    write_json(run.path / "heads" / "redundancy.json", told())
    draw(found(), CUT, "tiny", run.path / "heads")
    return run


def test_record_is_json_and_names_clusters_and_actions():
    one = json.loads(json.dumps(told()))
    assert one["kinds"]["decoder"]["measures"]["cka"]["clusters"] == [
        ["decoder/0/attention:0", "decoder/1/attention:1"]
    ]
    assert one["kinds"]["decoder"]["measures"]["weights"]["standard_error"] is None
    assert [suggestion["action"] for suggestion in one["suggestions"]] == ["prune", "merge"]
    assert one["matchings"][0]["between"] == ["decoder/0/attention", "decoder/1/attention"]


def test_similarity_within_layers_is_the_mean_over_their_pairs():
    value = np.eye(4)
    value[0, 1] = value[0, 2] = value[1, 2] = 0.3
    value[0, 3] = value[1, 3] = 0.9
    heads = (*HEADS[:3], HEADS[3])
    pairs = Pairs("cka", heads, heads, value, None)
    assert within_layers({"decoder": {"cka": pairs}}, "cka") == {"decoder/0/attention": pytest.approx(0.3)}


def test_table_has_a_row_for_every_pair_and_measure():
    header, *body = rows(found())
    assert header == ["kind", "measure", "head", "other", "value", "standard_error"]
    assert len(body) == 2 * 15
    assert ["decoder", "cka", HEADS[0], HEADS[4], "0.95", "0.01"] in body


def test_lines_say_what_is_suggested_and_what_is_beyond_the_cut():
    text = "\n".join(lines(told()))
    assert "prune decoder/1/attention:1 (like decoder/0/attention:0, distance 0.050, suggested): pruned +0.0100" in text
    assert "beyond the cut): pruned +0.3000 ± 0.0100, merged +0.2000 ± 0.0100" in text
    assert "all suggested heads pruned at once +0.0100 ± 0.0020; as many at random +0.0500 ± 0.0100" in text


def test_page_shows_what_is_there_and_stands_alone(run):
    (run.path / "heads" / "odd.txt").write_text("of no section")
    page = write_page(run.path)
    text = page.read_text()
    tags = Tags(text)
    assert tags.open == [] and len(tags.ids) == len(set(tags.ids)) > 4
    assert page == run.path / "heads" / "index.html" and text.count("<svg ") == 1 and "<script" not in text
    assert "Which heads do the same" in text and "What each head is worth" not in text
    assert "decoder/1/attention:1" in text and "odd.txt" in text and "+0.0100 ± 0.0020" in text


def test_sections_of_other_verbs_appear_with_their_pictures(run):
    for name in ("importance", "curve", "alive"):
        (run.path / "heads" / f"{name}.svg").write_bytes((run.path / "heads" / "redundancy.svg").read_bytes())
    text = write_page(run.path).read_text()
    titles = ["What each head is worth", "How many heads can go", "Heads alive while", "Which heads do the same"]
    places = [text.index(title) for title in titles]
    assert places == sorted(places) and text.count("<svg ") == 4


def test_report_of_the_sweep_links_the_page_and_the_page_links_back(run):
    link = f'href="../runs/{run.run_id}/heads/index.html"'
    assert link not in build_report(run.workdir).read_text()
    page = write_page(run.path)
    report = build_report(run.workdir)
    assert link in report.read_text()
    assert (report.parent / f"../runs/{run.run_id}/heads/index.html").resolve() == page.resolve()
    assert 'href="../../../report/index.html"' in page.read_text()


def test_atlas_is_linked_from_the_page_and_the_report(run):
    (run.path / "heads" / "atlas.html").write_text("an atlas")
    page = write_page(run.path)
    assert "The atlas" in page.read_text() and 'href="atlas.html"' in page.read_text()
    assert f'href="../runs/{run.run_id}/heads/atlas.html"' in build_report(run.workdir).read_text()


def test_page_of_what_is_no_run_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="is no run directory"):
        write_page(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
