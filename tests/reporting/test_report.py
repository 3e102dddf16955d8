import json
import re
from html.parser import HTMLParser

import pytest

from experiments import report as script
from mha_jax.reporting import build_report
from mha_jax.specs import UserError

DEFAULT, VASWANI = "configs/default.py", "configs/vaswani2017_table3.py:paper"
LOSSES = {0: [1.50, 1.51, 1.49], 1: [1.58, 1.60, 1.57], 3: [1.49, 1.50, 1.49], 5: [1.55, 1.56, 1.55]}


class Tags(HTMLParser):
    """Counts tags that are still open; SVG's own are all closed explicitly."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_everything_is_written_and_the_page_stands_alone(make_sweep):
    sweep = make_sweep(VASWANI, LOSSES, bleu=True)
    page = build_report(sweep.path)
    names = {file.name for file in page.parent.iterdir()}
    figures = {f"{name}.{form}" for name in ("quality", "differences", "curves", "cost") for form in ("svg", "png")}
    assert names == {"index.html", "table.md", "table.csv", "table.tex", "results.csv"} | figures
    text = page.read_text()
    assert not re.findall(
        r'(?:src|href)="(?:https?:)?//', text.replace('xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    )
    assert "<script" not in text and text.count("<svg ") == 4
    tags = Tags(text)
    assert tags.open == [] and len(tags.ids) > 4
    assert "3 queued" in text and "A single head is worse than 8" in text and "nrefs:1|case:mixed" in text


@pytest.mark.slow
def test_the_same_results_give_the_same_bytes(make_sweep):
    sweep = make_sweep(DEFAULT, {0: [1.6, 1.7, 1.8], 3: [1.5, 1.6, 1.7]})
    once = {file.name: file.read_bytes() for file in build_report(sweep.path).parent.iterdir()}
    twice = {file.name: file.read_bytes() for file in build_report(sweep.path).parent.iterdir()}
    assert once == twice


def test_a_sweep_of_which_nothing_ran_has_a_page(make_sweep):
    page = build_report(make_sweep(DEFAULT, {}).path).read_text()
    assert "No cell has finished yet." in page and "0 of 5 cells done" in page
    assert "undecided" in page


def test_hostile_text_is_shown_and_not_run(make_sweep):
    sweep = make_sweep(DEFAULT, {3: [1.5, 1.6, 1.7]})
    sweep.runs[0].update(state="failed", error="<script>alert(1)</script>")
    page = build_report(sweep.path).read_text()
    assert "<script" not in page and "&lt;script&gt;" in page


def test_what_went_wrong_on_the_way_is_told(make_sweep):
    sweep = make_sweep(DEFAULT, {})
    assert "What went wrong" not in build_report(sweep.path).read_text()
    sweep.runs[0].update(incidents=["attempt 1: killed by SIGKILL"])
    page = build_report(sweep.path).read_text()
    assert f"<li>{sweep.runs[0].run_id}: attempt 1: killed by SIGKILL</li>" in page


def test_time_outside_of_train_and_eval_is_told(make_sweep):
    """4 + 1 + 3.5 + 0.5 of 105 seconds."""
    page = build_report(make_sweep(DEFAULT, {3: [1.5, 1.6, 1.7]}).path).read_text()
    assert "8.6 %" in page


def test_running_cells_show_in_the_curves_only(make_sweep):
    sweep = make_sweep(DEFAULT, {0: [1.6, 1.7, 1.8], 3: [1.5, 1.6, 1.7]})
    sweep.runs[0].update(state="running", step=300)
    page = build_report(sweep.path)
    assert {row["cell"] for row in _table(page.parent / "table.csv")} == {"h=8"}
    assert (page.parent / "curves.svg").exists()


def _table(path):
    import csv

    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_script_prints_the_table_and_names_the_page(make_sweep, capsys):
    sweep = make_sweep(DEFAULT, {3: [1.5, 1.6, 1.7]})
    assert script.main(["report", f"--workdir={sweep.path}"]) == 0
    out = capsys.readouterr().out
    assert "**h=8**" in out and out.strip().endswith("index.html")


def test_the_script_wants_a_sweep(tmp_path):
    with pytest.raises(UserError, match="--workdir is missing"):
        script.main(["report"])
    with pytest.raises(UserError, match="holds no sweep"):
        script.main(["report", f"--workdir={tmp_path}"])


def test_a_claim_that_cannot_be_read_is_a_users_mistake(make_sweep):
    sweep = make_sweep(DEFAULT, {})
    facts = json.loads((sweep.path / "sweep.json").read_text())
    facts["claims"] = [{"text": "x", "metric": "validation/loss"}]
    (sweep.path / "sweep.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="claim 'x'"):
        build_report(sweep.path)
