import csv
import io

import pytest

from mha_jax.reporting import claims, formats, provenance, results, tables

DEFAULT, VASWANI = "configs/default.py", "configs/vaswani2017_table3.py:paper"


@pytest.fixture
def found(make_sweep):
    return results.read(make_sweep(DEFAULT, {0: [1.62, 1.71, 1.80], 3: [1.5, 1.6, 1.7], 4: [1.5, 1.6, 1.71]}).path)


def test_differences_are_cell_minus_base_paired_by_seed(found):
    table = tables.make(found)
    assert [row.is_base for row in table.rows] == [False, True, False]
    assert table.rows[0].differences["validation/loss"].mean == pytest.approx(0.11)
    assert table.rows[0].text["Δ loss"] == "+0.110 [+0.085, +0.135]"
    assert "Δ loss" not in table.rows[1].text


def test_p_values_are_adjusted_over_the_rows(found):
    table = tables.make(found)
    raw = [table.rows[i].differences["validation/loss"].p for i in (0, 2)]
    assert table.rows[0].adjusted["validation/loss"] == pytest.approx(2 * raw[0])
    assert table.rows[2].adjusted["validation/loss"] == pytest.approx(raw[1])


def test_derived_widths_and_costs_are_shown(found):
    text = tables.make(found).rows[0].text
    assert (text["h"], text["d_k"], text["d_v"], text["params"]) == ("1", "128", "128", "421k")
    assert (text["n"], text["memory plan / seen"]) == ("3", "5 MiB / 3 MiB")


def test_missing_cells_are_listed_and_never_zero(found):
    table = tables.make(found)
    assert table.missing == (("h=2", "queued"), ("h=4", "queued"))
    assert len(table.rows) == 3


def test_the_papers_numbers_stand_beside_ours(make_sweep):
    found = results.read(make_sweep(VASWANI, {0: [1.5, 1.6, 1.7], 6: [1.6, 1.7, 1.81]}, bleu=True).path)
    text = tables.make(found).rows[1].text
    assert (text["cell"], text["d_k"], text["d_v"]) == ("(B) d_k/4", "16", "64")
    assert (text["paper perplexity"], text["paper BLEU"], text["paper params"]) == ("5.16", "25.1", "58M")


def test_one_seed_shows_no_interval(make_sweep, tmp_path):
    config = tmp_path / "one_seed.py"
    config.write_text(
        "from configs import default\n"
        "def get_config():\n    c = default.get_config().unlock()\n    c.seeds = (5,)\n    return c.lock()\n"
        "def get_sweep():\n    yield from default.get_sweep()\n"
    )
    rows = tables.make(results.read(make_sweep(str(config), {0: [1.6], 3: [1.5]}).path)).rows
    assert (rows[0].text["validation loss"], rows[0].text["Δ loss"], rows[0].text["p loss"]) == ("1.600", "+0.100", "–")
    assert rows[0].text["n"] == "1"


def test_markdown_has_one_line_a_cell_and_the_provenance(found):
    verdict = claims.Verdict("8 beat 1.", "undecided", None, "1 common seed: no interval.")
    text = formats.markdown(tables.make(found), [verdict], provenance.caption(found))
    lines = text.splitlines()
    assert len({len(line) for line in lines if line.startswith("|")}) == 1  # aligned
    assert "- claim **undecided**: 8 beat 1. 1 common seed: no interval." in text
    assert "| **h=8** " in text and "- missing: h=2: queued" in text
    assert "c0ffee00c0ffee" in text and "ab" * 32 in text and "0, 1, 2 (n = 3)" in text


def test_csv_holds_bare_numbers(found):
    rows = list(csv.DictReader(io.StringIO(formats.csv_text(tables.make(found)))))
    assert float(rows[0]["validation/loss"]) == pytest.approx(1.71)
    assert float(rows[0]["validation/loss difference"]) == pytest.approx(0.11)
    assert rows[1]["validation/loss difference"] == ""


def test_latex_has_as_many_cells_in_every_row_and_escapes(found):
    text = formats.latex(tables.make(found), provenance.caption(found))
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    columns = len(tables.make(found).columns)
    assert len(body) == 4 and all(line.count(" & ") == columns - 1 for line in body)
    assert r"d\_k" in text and r"$\pm$" in text and "±" not in text


def test_what_is_held_fixed_is_computed_from_the_cells(make_sweep, found):
    assert "heads × d_k = 128, heads × d_v = 128, 421k parameters" in provenance.held_fixed(found)


def test_widths_that_vary_are_not_called_fixed(make_sweep):
    text = provenance.held_fixed(results.read(make_sweep(VASWANI, {}).path))
    assert "heads × d_v = 512" in text and "heads × d_k" not in text


@pytest.mark.parametrize(("value", "text"), [(421_376, "421k"), (65e6, "65M"), (3.3e9, "3.3G"), (12, "12")])
def test_counts(value: float, text: str):
    assert tables.count(value) == text
