import numpy as np
import pytest

from mha_jax.data.conllu import Sentence, read
from mha_jax.heads.coreference import asked, best_antecedents, from_misc, from_table, texts
from mha_jax.specs import UserError

TEXT = """\
# newdoc id = d1
# sent_id = s1
1\tThe\tthe\tDET\t_\t_\t3\tdet\t_\tEntity=(e1-person-1
2\told\told\tADJ\t_\t_\t3\tamod\t_\t_
3\tking\tking\tNOUN\t_\t_\t4\tnsubj\t_\tEntity=e1)
4\tmet\tmeet\tVERB\t_\t_\t0\troot\t_\t_
5\tAnna\tAnna\tPROPN\t_\t_\t4\tobj\t_\tEntity=(e2-person(e3)e2)

# sent_id = s2
1\tHe\the\tPRON\t_\t_\t2\tnsubj\t_\tEntity=(e1)
2\tasked\task\tVERB\t_\t_\t0\troot\t_\t_
3\tAnna\tAnna\tPROPN\t_\t_\t2\tobj\t_\tEntity=(e2)

# newdoc id = d2
# sent_id = s3
1\tHe\the\tPRON\t_\t_\t2\tnsubj\t_\tEntity=(e1)
2\tleft\tleave\tVERB\t_\t_\t0\troot\t_\t_

"""


@pytest.fixture
def sentences(tmp_path):
    path = tmp_path / "tiny.conllu"
    path.write_text(TEXT)
    return read(path)


def test_mentions_are_read_from_misc(sentences):
    assert sorted(from_misc(sentences[0])) == [(0, 2, "e1"), (4, 4, "e2"), (4, 4, "e3")]
    assert [sentence.document for sentence in sentences] == ["d1", "d1", "d2"]


@pytest.mark.parametrize(("cell", "fault"), [("e1)", "word 1: entity 'e1' ends"), ("(e1", "'e1' begins, but never")])
def test_brackets_that_do_not_match_are_refused(tmp_path, cell, fault):
    (tmp_path / "odd.conllu").write_text(f"1\tHe\the\tPRON\t_\t_\t0\troot\t_\tEntity={cell}\n\n")
    with pytest.raises(UserError, match=fault):
        from_misc(read(tmp_path / "odd.conllu")[0])


def test_sentences_of_a_document_are_joined_while_they_fit(sentences):
    whole, other = texts(sentences, [5, 3, 2], 8)
    assert [len(text.sentence.words) for text in (whole, other)] == [8, 2]
    assert [len(text.sentence.words) for text in texts(sentences, [5, 3, 2], 7)] == [5, 3, 2]
    assert [w.head for w in whole.sentence.words] == [2, 2, 3, -1, 3, 6, -1, 6]
    assert [w.space_before for w in whole.sentence.words][:6] == [False, True, True, True, True, True]
    # The head word of "The old king" is "king".
    assert [(m.entity, m.head) for m in whole.mentions if m.entity != "e3"] == [
        ("e1", 2), ("e2", 4), ("e1", 5), ("e2", 7)
    ]  # fmt: skip


def test_plain_lines_name_the_same_mentions(sentences, tmp_path):
    path = tmp_path / "mentions.tsv"
    path.write_text("# comment\n\ns1\t1\t3\te1\ns2\t1\t1\te1\n")
    found = from_table(path, sentences)
    assert found == {"s1": [(0, 2, "e1")], "s2": [(0, 0, "e1")]}
    assert [m.head for m in texts(sentences, [5, 3, 2], 8, found)[0].mentions] == [2, 5]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("s1 1 3 e1", "line 1: give sentence name"),
        ("s9\t1\t3\te1", "line 1: the treebank has no sentence 's9'"),
        ("s1\t3\t9\te1", "line 1: words 3 to 9; s1 has words 1 to 5"),
    ],
)
def test_a_broken_line_is_named(sentences, tmp_path, line, fault):
    (tmp_path / "odd.tsv").write_text(line)
    with pytest.raises(UserError, match=fault):
        from_table(tmp_path / "odd.tsv", sentences)


def test_heads_and_baselines_pick_among_the_mentions_before_by_hand(sentences):
    (whole, _) = texts(sentences, [5, 3, 2], 8)
    maps = np.zeros((1, 3, 8, 8))
    maps[0, 0, 5, 2], maps[0, 0, 7, 4] = 0.3, 0.3  # "He" to "king", "Anna" to "Anna"
    maps[0, 1, 5, 3], maps[0, 1, 5, 4], maps[0, 1, 7, 5] = 0.9, 0.1, 0.3  # verbs are no mentions
    found = asked([([whole], {"encoder/0/attention": maps})])
    assert found.kind.tolist() == ["pronoun", "proper"]
    # "Anna" is the head of e2 and of e3, the two alike in weight; e3 has no other mention.
    np.testing.assert_allclose(found.hits, [[1, 0, 1 / 3], [0.5, 0, 0.25]])
    # Of the two mentions that are one word, e2 closes last.
    assert found.baselines["nearest"].tolist() == [0, 0] and found.baselines["head match"].tolist() == [0, 1]


def test_planted_head_is_chosen_on_even_texts_and_scored_on_odd_ones(sentences):
    text = texts(sentences[:2], [5, 3], 8)[0]
    rng = np.random.default_rng(0)
    maps = rng.random((60, 4, 8, 8))
    right = rng.random(60) < 0.8
    maps[right, 2, 5, 2] = 2
    rows = {(r.kind, r.who): r for r in best_antecedents(asked([([text] * 60, {"encoder/0/attention": maps})]))}
    row = rows["pronoun", "encoder/0/attention:2"]
    assert row.mentions == 30 and row.searched == 4
    assert row.accuracy.low < right[1::2].mean() + (1 - right[1::2].mean()) / 3 < row.accuracy.high
    assert row.gain is not None and row.gain.low > 0 and rows["pronoun", "nearest"].gain is None
    assert rows["pronoun", "nearest"].accuracy.mean == 0


def test_texts_without_antecedents_are_refused():
    with pytest.raises(UserError, match="no mention has an antecedent"):
        asked([(texts([Sentence("s", ())], [0], 8), {"encoder/0/attention": np.ones((1, 1, 1, 1))})])
