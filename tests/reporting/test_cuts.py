"""Claims about heads: held, not held or undecided by the seeds of importance.json, curve.json and roles.json."""

import json

import pytest

from mha_jax.reporting.cuts import as_markdown, check_cuts
from mha_jax.specs import UserError

AT = {"curve": "bleu", "kind": "all", "order": "gradient"}


@pytest.fixture
def heads(tmp_path):
    """Three seeds: BLEU is 30 whole and 29.9 to 29.7 with a fifth cut; one head of four matters in each."""
    rows = [
        {"kind": "all", "order": "gradient", "seed": seed, "draw": 0, "removed": removed, "bleu": bleu}
        for seed in range(3)
        for removed, bleu in ((0.0, 30.0), (0.2, 29.9 - 0.1 * seed))
    ]
    (tmp_path / "curve.json").write_text(json.dumps({"rows": rows}))

    def measures(seed):
        means = {"encoder/0/attention": [-0.02, -0.3], "decoder/0/cross_attention": [-0.5 - 0.01 * seed, -0.9]}
        return {
            "leave_one_out": {"heads": {name: {"mean": m, "p_holm": [0.001, 0.5]} for name, m in means.items()}},
            "keep_one": {"heads": {name: {"mean": m, "p_holm": None} for name, m in means.items()}},
        }

    (tmp_path / "importance.json").write_text(json.dumps({"seeds": {str(seed): measures(seed) for seed in range(3)}}))
    return tmp_path


def status(heads, less, than, margin=0.0):
    return check_cuts([{"text": "t", "less": less, "than": than, "margin": margin}], heads)[0].status


def test_a_point_of_a_curve_is_compared_with_another_seed_by_seed(heads):
    whole, cut = {**AT, "removed": 0.0}, {**AT, "removed": 0.2}
    assert status(heads, cut, whole) == "undecided"  # 0.1 to 0.3 below: the interval reaches beyond 0
    assert status(heads, whole, cut, margin=-0.5) == "held"
    assert status(heads, whole, cut) == "undecided"
    assert status(heads, whole, {"value": 20}) == "not held"
    assert status(heads, {**whole, "times": 0.5}, {"value": 20}) == "held"


def test_shares_of_significant_heads_and_best_heads_alone_are_read(heads):
    half = {"significant": "leave_one_out", "level": 0.01}
    assert status(heads, half, {"value": 0.6}) == "held"
    assert status(heads, half, {"value": 0.4}) == "not held"
    assert status(heads, {"best_alone": "encoder"}, {"value": 0.05}) == "held"
    assert status(heads, {"best_alone": "encoder", "layer": -1}, {"best_alone": "cross", "layer": -1}) == "held"


def test_relations_shapes_and_heads_that_help_by_going_are_read(heads):
    def of_seed(seed):
        det = {"relation": "det", "best": True, "accuracy": {"mean": 0.9}, "baseline": {"mean": 0.5 + 0.01 * seed}}
        shapes = {"vertical": {"mean": [0.5, 0.1]}, "diagonal": {"mean": [0.2, 0.4]}}
        worse = {**det, "best": False, "accuracy": {"mean": 0.1}}
        attentions = {"encoder/0/attention": {"heads": 2, "shapes": shapes}, "cross": {"heads": 1, "shapes": None}}
        return {"relations": [det, worse], "attentions": attentions}

    (heads / "roles.json").write_text(json.dumps({"seeds": {str(seed): of_seed(seed) for seed in range(3)}}))
    best = {"relation": "det", "part": "accuracy"}
    assert status(heads, {"relation": "det", "part": "baseline"}, best, margin=0.3) == "held"
    assert status(heads, {"relation": "det", "part": "baseline"}, best, margin=0.395) == "undecided"
    assert status(heads, {"relation": "nsubj", "part": "baseline"}, best) == "undecided"
    assert status(heads, {"shapes": ["vertical", "diagonal"]}, {"value": 0.61}) == "held"  # (0.7 + 0.5) / 2
    assert status(heads, {"shapes": ["vertical", "diagonal"]}, {"value": 0.59}) == "not held"
    helped = {"helped": "leave_one_out", "level": 0.01}
    assert status(heads, {"value": 0.4}, helped) == "held"  # two of four have p 0.001 and lower the loss
    assert status(heads, {"value": 0.6}, helped) == "not held"


def test_what_is_not_there_is_undecided_and_said_so(heads, tmp_path):
    [verdict] = check_cuts([{"text": "t", "less": {**AT, "removed": 0.3}, "than": {"value": 1}}], heads)
    assert (verdict.status, verdict.sentence) == ("undecided", "0 seeds have both numbers: no interval.")
    assert "| t | undecided |" in as_markdown([verdict])


def test_claims_that_are_not_understood_are_refused(heads):
    with pytest.raises(UserError, match="is no point; known are curve"):
        check_cuts([{"text": "t", "less": {"bleu": 3}, "than": {"value": 1}}], heads)
    with pytest.raises(UserError, match="needs 'text', 'less' and 'than'"):
        check_cuts([{"text": "t"}], heads)
