"""The verbs `all` and `table`: which verbs run on which runs, what is skipped, and what they refuse."""

import pytest
from etils import epath

from experiments import heads
from experiments.verbs import importance, redundancy
from mha_jax.specs import UserError
from mha_jax.sweeps.store import read_json, write_json
from tests.reporting.conftest import write_sweep


@pytest.fixture
def calls(monkeypatch):
    """The command lines that two verbs are given; nothing is computed."""
    made = []
    for verb in (importance, redundancy):
        monkeypatch.setattr(verb, "main", made.append)
    return made


@pytest.fixture
def sweep(tmp_path):
    """Two finished runs of a sweep, and others that wait."""
    return write_sweep(tmp_path / "sweep", "configs/voita2019.py:multi30k", {0: [1.6, 1.7, 1.8], 1: [1.5, 1.6, 1.7]})


@pytest.mark.slow
def test_verbs_run_on_finished_runs_and_not_twice_by_the_same_flags(script, calls, sweep):
    given = ["all", f"--workdir={sweep.path}", "--verbs=importance", "--give=redundancy --batches=2"]
    assert script(heads.main, *given).code == 0
    done = sorted(str(run.path) for run in sweep.runs if run.state == "done")
    assert [call[:1] + call[2:] for call in calls] == [["importance"], ["redundancy", "--batches=2"]] * 2
    assert sorted({call[1] for call in calls}) == [f"--run={path}" for path in done]
    calls.clear()
    assert "importance is there" in script(heads.main, *given).out and not calls
    assert script(heads.main, *given[:3], "--give=redundancy --batches=3").code == 0
    assert [call[0] for call in calls] == ["redundancy"] * 2


def test_what_another_process_looked_into_meanwhile_stays_recorded(script, sweep, monkeypatch):
    def meanwhile(argv):
        write_json(epath.Path(argv[1].removeprefix("--run=")) / "heads" / ".given.json", {"curve": {"flags": []}})

    monkeypatch.setattr(importance, "main", meanwhile)
    assert script(heads.main, "all", f"--workdir={sweep.path}", "--verbs=importance").code == 0
    files = [run.path / "heads" / ".given.json" for run in sweep.runs if run.state == "done"]
    assert [read_json(file).keys() for file in files] == [{"curve", "importance"}] * 2


def test_runs_that_are_of_no_sweep_are_looked_into_without_a_report(script, calls, sweep):
    done = sorted(f"--run={run.path}" for run in sweep.runs if run.state == "done")
    (sweep.path / "sweep.json").unlink()
    ended = script(heads.main, "all", f"--workdir={sweep.path}", "--verbs=importance")
    assert ended.code == 0 and "report" not in ended.out
    assert done and [call[1] for call in calls] == done


def test_what_cannot_be_run_is_told_and_the_rest_goes_on(script, calls, sweep, monkeypatch):
    def refuse(argv):
        raise UserError("it has no heads")

    monkeypatch.setattr(importance, "main", refuse)
    ended = script(heads.main, "all", f"--workdir={sweep.path}", "--verbs=importance,redundancy")
    assert ended.code == 2 and ended.err.count("importance: it has no heads") == 2
    assert [call[0] for call in calls] == ["redundancy"] * 2


@pytest.mark.slow
def test_table_is_printed_and_in_the_report(script, sweep):
    run = next(run for run in sweep.runs if run.state == "done")
    roles = {"attentions": {"decoder/0/attention": {"role": ["sink", None]}}}
    write_json(run.path / "heads" / "roles.json", {"seeds": {"0": roles}})
    ended = script(heads.main, "table", f"--workdir={sweep.path}")
    assert ended.code == 0 and "heads with a role" in ended.out
    assert (sweep.path / "report" / "interpretability.svg").exists()


def test_mistakes_are_one_line(script, tmp_path, sweep):
    assert "--workdir is missing" in script(heads.main, "all").complaint
    assert "--workdir is missing" in script(heads.main, "table").complaint
    assert "holds no sweep" in script(heads.main, "table", f"--workdir={tmp_path}").complaint
    assert "has no finished run" in script(heads.main, "all", f"--workdir={tmp_path / 'none'}").complaint
    assert "has been looked into" in script(heads.main, "table", f"--workdir={sweep.path}").complaint
    where = f"--workdir={sweep.path}"
    assert "'grow' is no verb that looks into a run" in script(heads.main, "all", where, "--verbs=grow").complaint
    assert "names a run" in script(heads.main, "all", where, "--give=importance --run=X").complaint
    assert not (sweep.path / "report").exists()
