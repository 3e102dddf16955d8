"""The verb `roles` from a run to its files, and what it refuses."""

import json

import pytest

from experiments import heads
from tests.end_to_end.test_heads_importance import create
from tests.training.test_loop import TEXT

SENTENCE = """\
# newdoc
# sent_id = s{n}
1\the\the\tPRON\t_\t_\t2\tnsubj\t_\tEntity=(e1)
2\tsat\tsit\tVERB\t_\t_\t0\troot\t_\t_
3\the\the\tPRON\t_\t_\t2\tobj\t_\tEntity=(e1)

"""
LONG = "1\tinterminability\t_\tNOUN\t_\t_\t0\troot\t_\t_\n\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two seeds, where a sweep would put it."""
    folder = tmp_path_factory.mktemp("roles")
    (folder / "corpus.txt").write_text(TEXT * 3)
    data = {"data__files__train": str(folder / "corpus.txt"), "data__validation_fraction": 0.3}
    made = create(folder / "runs" / "tiny", "lm", **data)
    (folder / "bank.conllu").write_text("".join(SENTENCE.format(n=n) for n in range(50)) + "# sent_id = long\n" + LONG)
    (folder / "mentions.tsv").write_text("".join(f"s{n}\t1\t1\te\ns{n}\t3\t3\te\n" for n in range(50)))
    return made


@pytest.mark.slow
def test_files_and_page_of_a_run(run, script):
    bank, mentions = run.parents[1] / "bank.conllu", run.parents[1] / "mentions.tsv"
    flags = (f"--run={run}", f"--treebank={bank}", "--max_examples=200")
    ended = script(heads.main, "roles", *flags, f"--coreference={bank}")
    assert ended.code == 0, ended.err
    names = {path.name for path in (run / "heads").iterdir()}
    assert names == {"index.html", "relations.csv", "relations.svg", "relations.png", "coreference.csv"} | {
        f"roles.{form}" for form in ("json", "csv", "svg", "png")
    }
    told = json.loads((run / "heads" / "roles.json").read_text())
    assert told["seeds"].keys() == {"0", "1"} and told["left_out"][str(bank)] == ["long"]
    assert "1 sentences have more than 13 pieces and are left out: long" in ended.out
    one = told["seeds"]["0"]
    attention = one["attentions"]["decoder/1/attention"]
    assert attention["heads"] == len(attention["role"]) == 4 and attention["scores"]["next"]["mean"] == [None] * 4
    relations = {(row["relation"], row["direction"]): row for row in one["relations"]}
    # The verb follows its subject and sees it; its object it does not see, but is seen by.
    assert relations["nsubj", "head"]["left_out"] == 0 and relations["obj", "dependent"]["left_out"] == 0
    assert ("nsubj", "dependent") not in relations and relations["obj", "dependent"]["occurrences"] == 25
    assert {row["kind"] for row in one["coreference"]} == {"all", "pronoun"}
    # The same mentions from lines.
    assert script(heads.main, "roles", *flags, "--seed=0", f"--coreference={mentions}").code == 0
    again = json.loads((run / "heads" / "roles.json").read_text())["seeds"]
    assert again.keys() == {"0"} and again["0"]["coreference"] == one["coreference"]
    assert "no seed 7" in script(heads.main, "roles", f"--run={run}", "--seed=7").complaint
    assert "no split 'night'" in script(heads.main, "roles", f"--run={run}", "--split=night").complaint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--run is missing"),
        (("--run=DIR", "--treebank_test=x.conllu"), "--treebank_test scores what --treebank chooses: give both"),
        (("--run=DIR", "--coreference=x.tsv"), "--coreference=x.tsv names words of sentences: give those by"),
        (("--run=DIR", "--max_examples=0"), "flag --max_examples=0"),
        (("--run=DIR", "--positional=90"), "flag --positional=90"),
        (("--run=DIR",), "DIR is no run directory"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(script, tmp_path, arguments, message):
    given = [argument.replace("DIR", str(tmp_path / "DIR")) for argument in arguments]
    assert message in script(heads.main, "roles", *given).complaint
    assert not (tmp_path / "DIR").exists()
