"""Who is named, and what is left behind, when processes of one run fail, go silent or fall behind."""

import json
import os

import pytest
from etils import epath

from mha_jax.training import watchdog
from mha_jax.training.watchdog import Watchdog


class Ended(Exception):
    pass


@pytest.fixture
def quick(monkeypatch):
    """No exit of the test's own process, and no long waits."""
    monkeypatch.setattr(watchdog, "_LINGER_BEATS", 0)

    def leave(code):
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", leave)


@pytest.fixture
def told():
    return []


@pytest.fixture
def dog(tmp_path, told, quick):
    """That of process 1 of three, with a limit of 0.4 s and a beat each 0.2 s; its thread is not started."""
    return Watchdog(epath.Path(tmp_path), 1, 3, 0.4, lambda line, code: told.append((line, code)))


def says(dog, process, **facts):
    """What another process writes about itself."""
    file = dog._folder / str(process)
    before = json.loads(file.read_text()) if file.exists() else {"sign": 0}
    file.write_text(
        json.dumps({"beats": 0, "doing": "the start", "ended": None, **before, **facts, "sign": before["sign"] + 1})
    )


def test_a_failure_of_another_process_ends_this_one_with_its_line_and_code(dog, told):
    says(dog, 0)
    says(dog, 2, ended=["the text is empty", 2])
    with pytest.raises(Ended, match="2"):
        dog._watch()
    assert told == [("process 2 failed: the text is empty", 2)]
    assert json.loads((dog._folder / "1").read_text())["ended"] == list(told[0])


def test_a_line_that_names_a_process_already_is_passed_on_as_it_is(dog, told):
    says(dog, 2, ended=["process 0 does not answer", 1])
    with pytest.raises(Ended):
        dog._watch()
    assert told[0][0] == "process 0 does not answer"


def test_a_file_of_an_earlier_attempt_does_not_count(tmp_path, quick, told):
    folder = epath.Path(tmp_path) / "heartbeats"
    folder.mkdir()
    (folder / "0").write_text(json.dumps({"ended": ["an old story", 1], "beats": 7, "doing": "step 3"}))
    dog = Watchdog(epath.Path(tmp_path), 1, 2, 0.4, lambda line, code: told.append(line))
    with pytest.raises(Ended):
        dog._watch()
    assert told == ["no step has ended for 0.4 s: process 0 does not answer, never heard of"]


def test_who_is_behind_is_named_where_all_are_alive(dog):
    dog._limit = 100.0
    dog.beat("step 38")
    dog.beat("step 39")
    says(dog, 0, beats=2, doing="step 39")
    says(dog, 2, beats=1, doing="step 38")
    for peer in dog._peers.values():
        peer.look()
    assert dog._who() == "no step has ended for 100 s: process 2 is behind, at step 38"
    says(dog, 2, beats=2, doing="step 39")
    dog._peers[2].look()
    assert dog._who().endswith("all 3 processes wait at step 39; no one is behind")


def test_an_error_that_echoes_the_end_of_another_process_names_that_process(dog, told):
    says(dog, 0, doing="step 12")
    dog._peers[0].look()
    says(dog, 2, left=True)
    with pytest.raises(Ended, match="1"):
        dog.fail("ValueError: connection closed by peer", 1, echo=True)
    assert told == [("process 0 is gone, last heard of at step 12", 1)]


def test_an_error_of_its_own_is_told_at_once(dog, told):
    with pytest.raises(Ended, match="2"):
        dog.fail("the vocabulary is too large", 2, echo=False)
    assert told == [("the vocabulary is too large", 2)]


def test_the_stacks_of_all_threads_are_left_in_the_directory(dog, tmp_path):
    dog._dump_stacks()
    assert "test_the_stacks_of_all_threads_are_left" in (tmp_path / "stacks-1.txt").read_text()


def test_a_disk_that_is_full_for_a_while_does_not_end_the_watch(dog, told, monkeypatch):
    monkeypatch.setattr(dog, "_folder", epath.Path("/dev/full"))  # no heartbeat can be written below it
    with pytest.raises(Ended, match="1"):
        dog._watch()
    assert told[0][0].startswith("no step has ended for 0.4 s: ")
