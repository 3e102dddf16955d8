"""Interpretability beside quality: numbers of each seed from the files of the verbs, intervals, paired differences."""

import math

import pytest
from etils import epath

from mha_jax.reporting import build_report, interpretability, results
from mha_jax.sweeps.store import write_json

A, B = "decoder/0/attention", "decoder/1/attention"


def write_heads(heads, *, roles):
    """Three seeds of two attentions of two heads; `roles` are those of the four heads, one list a seed."""
    seeds = {str(s): {"attentions": {A: {"role": own[:2]}, B: {"role": own[2:]}}} for s, own in enumerate(roles)}
    for one in seeds["0"]["attentions"].values():
        one |= {"strength": [0.9, 0.2], "strength_elsewhere": [0.1, 0.0]}
    seeds["0"]["attentions"][B]["strength"] = [0.1, 0.0]
    write_json(heads / "roles.json", {"seeds": seeds})
    write_json(heads / "redundancy.json", {"within_layers": {"0": {A: 0.5, B: 0.1}, "1": {A: 0.2}, "2": {}}})
    alone = {A: {"mean": [0.5, 0.001], "p_holm": [1e-9, 0.7]}, B: {"mean": [-0.1, 0.2], "p_holm": [1e-9, 0.04]}}
    write_json(heads / "importance.json", {"seeds": {"0": {"leave_one_out": {"heads": alone}}}})
    points = [(4, 2.0), (3, 2.004), (2, 2.02), (1, 2.0), (0, 5.0)]
    row = {"kind": "all", "order": "gradient", "seed": 2, "draw": 0}
    rows = [row | {"left": left, "loss": loss} for left, loss in points]
    rows += [row | {"order": "random", "left": 0, "loss": 0.0}, row | {"kind": "cross", "left": 0, "loss": 0.0}]
    write_json(heads / "curve.json", {"order": "gradient", "rows": rows})
    pos = {A: {"selectivity": [0.1, 0.3]}, B: {"selectivity": [0.2, 0.2]}}
    tense = {A: {"selectivity": [0.0, 0.1]}, B: {"selectivity": [0.1, 0.0]}}
    tasks = {"pos": {"embedding": {"selectivity": [0.9]}, "heads": pos}, "tense": {"heads": tense}}
    write_json(heads / "probes.json", {"seeds": {"0": {"tasks": tasks}}})


def test_numbers_of_a_run_are_those_of_its_files(tmp_path):
    write_heads(epath.Path(tmp_path), roles=[["previous", "sink", "sink", None], [None] * 4])
    found = interpretability.of_run(tmp_path)
    entropy = -(math.log(1 / 3) / 3 + 2 / 3 * math.log(2 / 3))
    assert found["heads_with_role"] == {0: 3, 1: 0} and found["share_with_role"] == {0: 0.75, 1: 0}
    assert found["role_entropy"] == {0: pytest.approx(entropy), 1: 0}
    assert found["role_strength"] == {0: pytest.approx(0.3)}  # files of before have none
    assert found["role_strength_elsewhere"] == {0: pytest.approx(0.05)}
    assert found["similarity"] == {0: pytest.approx(0.3), 1: 0.2}  # a seed without pairs has no number
    assert found["free_alone"] == {0: 0.5}  # one is not significant, one lowers the loss
    assert found["removable"] == {2: 1} and found["share_removable"] == {2: 0.25}  # the third point is too high
    assert found["best_selectivity"] == {0: pytest.approx((0.3 + 0.1) / 2)}
    assert found["mean_selectivity"] == {0: pytest.approx((0.2 + 0.05) / 2)}


@pytest.fixture
def sweep(make_sweep):
    """Two cells of three seeds; only the roles of their heads are known. The base has 4, 3, 4 heads with a role."""
    made = make_sweep("configs/default.py", {0: [1.6, 1.7, 1.8]})
    names = ["previous", "sink", "same", "next"]
    [run] = [run for run in made.runs if (run.path / "metrics.jsonl").exists()]
    roles = [[*names[:n], *[None] * (4 - n)] for n in (4, 3, 4)]
    seeds = {str(s): {"attentions": {A: {"role": own[:2]}, B: {"role": own[2:]}}} for s, own in enumerate(roles)}
    write_json(run.path / "heads" / "roles.json", {"seeds": seeds})
    return made


def test_report_has_the_table_as_page_text_and_numbers(sweep):
    workdir = sweep.path
    page = build_report(workdir).read_text()
    text = (workdir / "report" / "interpretability.md").read_text()
    assert "Interpretability against quality" in page and "heads with a role" in page
    assert "3.7 ± 1.4" in text and "1.700 ± 0.248" in text  # t(2) = 4.303: s / sqrt(3) is 1 / 3 and 0.1 / sqrt(3)
    assert "selectivity" not in text
    header, line = (workdir / "report" / "interpretability.csv").read_text().splitlines()
    row = dict(zip(header.split(","), line.split(","), strict=False))
    assert float(row["heads_with_role"]) == pytest.approx(11 / 3) and row["heads_with_role n"] == "3"
    assert (workdir / "report" / "interpretability.png").exists()


def test_differences_are_paired_by_seed_and_correlations_tell_their_n(monkeypatch, make_sweep):
    made = make_sweep("configs/voita2019.py:multi30k", {0: [1.6, 1.7, 1.8], 1: [1.5, 1.6, 1.7], 2: [1.4, 1.5, 1.6]})
    found = results.read(made.path)
    counts = {cell.run: i for i, cell in enumerate(found.done)}
    monkeypatch.setattr(
        interpretability,
        "of_run",
        lambda heads: {"heads_with_role": {s: 3.0 + s + 2 * counts[heads.parent.name] for s in range(3)}},
    )
    made_of = interpretability.make(found, made.path)
    assert made_of is not None
    base = next(row for row in made_of.rows if row.is_base)
    assert base.differences == {}
    for row in made_of.rows:
        if not row.is_base:
            apart = 2.0 * (counts[row.cell.run] - counts[base.cell.run])
            assert row.differences["heads_with_role"].mean == pytest.approx(apart)
            assert row.differences["heads_with_role"].low == pytest.approx(apart)  # every seed differs alike
    assert ("validation/loss", "heads_with_role", pytest.approx(-1.0), 3) in made_of.correlations


def test_sweep_that_nobody_looked_into_has_no_section(make_sweep):
    made = make_sweep("configs/default.py", {0: [1.6, 1.7, 1.8]})
    assert "Interpretability" not in build_report(made.path).read_text()
    assert not (made.path / "report" / "interpretability.md").exists()
