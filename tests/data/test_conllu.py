from pathlib import Path

import pytest

from mha_jax.data.conllu import read
from mha_jax.specs import UserError

EWT = Path(__file__).resolve().parents[3] / "shared" / "data" / "ud_english_ewt"

TEXT = """\
# sent_id = s1
# text = He doesn't know du, yet.
1\tHe\the\tPRON\tPRP\tCase=Nom|Number=Sing\t4\tnsubj\t_\t_
2-3\tdoesn't\t_\t_\t_\t_\t_\t_\t_\t_
2\tdoes\tdo\tAUX\tVBZ\t_\t4\taux\t_\t_
3\tn't\tnot\tPART\tRB\t_\t4\tadvmod\t_\t_
4\tknow\tknow\tVERB\tVB\t_\t0\troot\t_\t_
4.1\tknow\tknow\tVERB\tVB\t_\t_\t_\t0:root\t_
5-6\tdu\t_\t_\t_\t_\t_\t_\t_\tSpaceAfter=No
5\tde\tde\tADP\t_\t_\t6\tcase\t_\t_
6\tle\tle\tDET\t_\t_\t4\tobl:arg\t_\t_
7\t,\t,\tPUNCT\t,\t_\t4\tpunct\t_\t_
8\tyet\tyet\tADV\tRB\t_\t4\tadvmod\t_\tSpaceAfter=No
9\t.\t.\tPUNCT\t.\t_\t4\tpunct\t_\tEntity=(e1|Odd

1\tYes\tyes\tINTJ\tUH\t_\t0\troot\t_\t_
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tiny.conllu"
    path.write_text(TEXT)
    return path


def test_words_heads_and_features_are_read(file):
    first, second = read(file)
    assert (first.name, second.name) == ("s1", "line 16")
    assert [w.form for w in first.words] == ["He", "does", "n't", "know", "de", "le", ",", "yet", "."]
    assert [w.head for w in first.words] == [3, 3, 3, -1, 5, 3, 3, 3, 3]
    assert first.words[0].feats == {"Case": "Nom", "Number": "Sing"}
    assert (first.words[5].deprel, first.words[5].relation) == ("obl:arg", "obl")
    assert first.words[8].misc == {"Entity": "(e1", "Odd": ""}


def test_spaces_are_those_of_the_text(file):
    spaces = [w.space_before for w in read(file)[0].words]
    # "doesn't" is spelled by its words and "du" is not; the comma follows it without a space.
    assert spaces == [False, True, False, True, True, True, False, True, False]


def test_a_limit_stops_before_what_follows(file):
    file.write_text(TEXT + "\nbroken\n")
    assert len(read(file, limit=2)) == 2


@pytest.mark.parametrize(
    ("line", "replacement", "fault"),
    [
        (7, "4\tknow\tVERB", "line 7: 3 columns"),
        (7, "5\tknow\tknow\tVERB\tVB\t_\t0\troot\t_\t_", "line 7: id '5'; word 4 follows"),
        (3, "1\tHe\the\tPRON\tPRP\t_\t12\tnsubj\t_\t_", "line 3: head '12'"),
        (3, "1\tHe\the\tPRON\tPRP\t_\t1\tnsubj\t_\t_", "line 3: head '1'"),
        (3, "1\tHe\the\tPRON\tPRP\t_\t_\tnsubj\t_\t_", "line 3: head '_'"),
    ],
)
def test_a_broken_line_is_named(file, line, replacement, fault):
    lines = TEXT.split("\n")
    lines[line - 1] = replacement
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match=fault):
        read(file)


def test_a_file_that_is_none_or_empty_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no file"):
        read(tmp_path / "absent.conllu")
    (tmp_path / "empty.conllu").write_text("# nothing\n")
    with pytest.raises(UserError, match="no sentences"):
        read(tmp_path / "empty.conllu")
    (tmp_path / "odd.conllu.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "odd.conllu.gz")


@pytest.mark.skipif(not EWT.exists(), reason="the English Web Treebank is not here")
def test_the_english_web_treebank_has_its_published_counts():
    sentences = read(EWT / "en_ewt-ud-dev.conllu.gz")
    assert (len(sentences), sum(len(s.words) for s in sentences)) == (2001, 25147)
