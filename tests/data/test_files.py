import gzip

import pytest

from mha_jax.data import files
from mha_jax.specs import UserError


def _write(path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def test_blank_lines_part_documents(tmp_path):
    path = _write(tmp_path / "a.txt", "one\nstill one\n\n \t\n\ntwo é\n".encode())
    assert files.documents({"train": path}) == {"train": ["one\nstill one", "two é"]}


def test_without_blank_lines_each_line_is_a_document(tmp_path):
    path = _write(tmp_path / "a.txt", b"one\ntwo\nthree")
    assert files.documents({"train": path}) == {"train": ["one", "two", "three"]}


def test_gzip_windows_line_ends_and_byte_order_mark_change_nothing(tmp_path):
    plain = _write(tmp_path / "a.txt", b"one\ntwo\n\nthree\n")
    packed = _write(tmp_path / "a.txt.gz", gzip.compress(b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree\r\n"))
    assert files.documents({"train": plain}) == files.documents({"train": packed})


def test_several_files_follow_each_other_and_empty_entries_are_left_out(tmp_path):
    paths = tuple(_write(tmp_path / name, name.encode()) for name in ("b", "a"))
    assert files.documents({"train": paths, "validation": None}) == {"train": ["b", "a"]}


def test_parallel_lines_match_even_with_other_line_separators_inside(tmp_path):
    source = _write(tmp_path / "s", "a\u2028b\fc\n\nlast".encode())
    target = _write(tmp_path / "t", b"x\ny\nz\n")
    assert files.pairs({"train": (source, target)}) == {"train": [("a\u2028b\fc", "x"), ("", "y"), ("last", "z")]}


def test_parallel_files_of_different_length_name_both_counts(tmp_path):
    source, target = _write(tmp_path / "s", b"a\nb\nc\n"), _write(tmp_path / "t", b"x\ny\n")
    with pytest.raises(UserError, match=r"has 3 lines and .* has 2"):
        files.pairs({"validation": (source, target)})


def test_not_utf8_names_file_and_byte(tmp_path):
    path = _write(tmp_path / "latin1.txt", "abcé".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin1\.txt is not UTF-8: byte 3 is 0xe9"):
        files.documents({"train": path})


def test_files_that_cannot_be_read_are_named(tmp_path):
    empty, cut = _write(tmp_path / "empty", b" \n"), _write(tmp_path / "cut.gz", gzip.compress(b"a" * 999)[:-9])
    for path, fault in [(empty, "is empty"), (cut, "not a whole gzip"), (tmp_path / "no", "does not exist")]:
        with pytest.raises(UserError, match=fault) as error:
            files.documents({"train": str(path)})
        assert str(path) in str(error.value)
    with pytest.raises(UserError, match="is a directory"):
        files.digests({"train": str(tmp_path)})


def test_unknown_split_and_single_parallel_file_are_refused(tmp_path):
    path = _write(tmp_path / "a", b"a")
    with pytest.raises(UserError, match="'val'"):
        files.documents({"train": path, "val": path})
    with pytest.raises(UserError, match="must be two files"):
        files.pairs({"train": path})


def test_labelled_lines_are_a_label_a_tab_and_a_text_and_labels_are_sorted(tmp_path):
    train = _write(tmp_path / "train.tsv", "pos\tgood fun \r\nneg\tb\u2028d\npos\tfine\n".encode())
    test = _write(tmp_path / "test.tsv.gz", gzip.compress(b"neg\tso so"))
    labels, lines = files.labelled({"train": train, "test": test})
    assert labels == ("neg", "pos")
    assert lines == {"train": [("pos", "good fun"), ("neg", "b\u2028d"), ("pos", "fine")], "test": [("neg", "so so")]}


@pytest.mark.parametrize("line", ["no tab here", "neg\t", "\ttext", "neg\ta\tb", ""])
def test_a_line_that_is_no_label_and_text_is_named_by_its_number(tmp_path, line):
    path = _write(tmp_path / "train.tsv", f"pos\tgood\n{line}\npos\tfine\n".encode())
    with pytest.raises(UserError, match=r"train\.tsv, line 2: .* is not a label, a tab and a text"):
        files.labelled({"train": path})


def test_a_label_that_training_has_not_is_named(tmp_path):
    train, test = _write(tmp_path / "train.tsv", b"pos\tgood\n"), _write(tmp_path / "test.tsv", b"pso\tgood\n")
    with pytest.raises(UserError, match=r"data\.files\.test has the label 'pso'; training has pos"):
        files.labelled({"train": train, "test": test})
