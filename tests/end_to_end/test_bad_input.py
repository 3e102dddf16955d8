"""What a user gets wrong is answered with exit code 2 and one line, before anything is compiled or overwritten."""

import gzip

import pytest

from experiments import sweep, train
from mha_jax.sweeps import preparation
from mha_jax.training import loop

DEFAULT = "--config=configs/default.py:smoke"
PARALLEL = "--config=configs/vaswani2017_table3.py:multi30k"


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    def refuse(*_):
        raise AssertionError("the program was built for input that is wrong")

    monkeypatch.setattr(loop, "make_program", refuse)
    monkeypatch.setattr(preparation, "devices", lambda: {"platform": "cpu", "kind": "cpu", "count": 8})


@pytest.fixture
def files(tmp_path):
    """Where the bad text lies."""
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("to be or not to be\n\nthat is the question\n\n" * 40)
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 au lait\n" * 9)
    for name, lines in (("three.en.gz", 3), ("two.de.gz", 2)):
        with gzip.open(tmp_path / name, "wt") as file:
            file.write("ein Satz\n" * lines)
    return tmp_path


def text(name, *more):
    return [DEFAULT, "--config.data.source=text", "--config.data.files.train={files}/" + name, *more]


CASES = {
    "width not divisible": (
        [DEFAULT, "--config.model.num_heads=7"],
        "d_model=32 is not a multiple of num_heads=7; 1, 2, 4, 8, 16 and 32 fit",
    ),
    "groups without a map": (
        [DEFAULT, "--config.model.num_heads=8", "--config.model.num_kv_heads=3"],
        "num_heads=8 is not a multiple of num_kv_heads=3; 1, 2, 4 and 8 fit, or give head_to_group",
    ),
    "negative heads": ([DEFAULT, "--config.model.num_heads=-2"], "num_heads=-2 must be an integer of at least 0"),
    "zero width": ([DEFAULT, "--config.model.qk_dim=0"], "qk_dim=0 must be an integer of at least 1"),
    "zero d_model": ([DEFAULT, "--config.model.d_model=0"], "model.d_model=0 must be an integer of at least 1"),
    "unknown backend": (
        [DEFAULT, "--config.model.backend=fast"],
        "model.backend='fast' is not one of 'auto', 'einsum',",
    ),
    "no steps": ([DEFAULT, "--config.training.steps=0"], "training.steps=0 must be an integer of at least 1"),
    "not a number": ([DEFAULT, "--config.model.num_heads=many"], "--config.model.num_heads=many"),
    "unknown field": ([DEFAULT, "--config.model.num_heds=3"], "did you mean 'model.num_heads'?"),
    "unknown section": ([DEFAULT, "--config.modle.num_heads=3"], "did you mean 'model.num_heads'?"),
    "unknown flag": ([DEFAULT, "--wrokdir=x"], "Did you mean: workdir"),
    "stray word": ([DEFAULT, "fast"], "'fast' is not understood"),
    "missing config file": (["--config=configs/none.py"], "config file 'configs/none.py' does not exist"),
    "unknown profile": (["--config=configs/default.py:smok"], "unknown profile 'smok'"),
    "longer than positions": (
        [DEFAULT, "--config.data.length=64"],
        "data.length=64 is longer than model.max_length=32 positions",
    ),
    "batch over devices": (
        [DEFAULT, "--config.data.batch_size=9"],
        "data.batch_size=9 is not a multiple of 8 data devices; 1 and 3 fit",
    ),
    "unknown dataset": (
        [DEFAULT, "--config.data.source=tfds", "--config.data.tfds_name=no_such_set_anywhere"],
        "no_such_set_anywhere",
    ),
    "missing text": (text("none.txt"), "none.txt"),
    "empty text": (text("empty.txt"), "empty.txt"),
    "not UTF-8": (text("latin1.txt"), "latin1.txt"),
    "vocabulary too large": (
        text("short.txt", "--config.data.tokenizer=bpe", "--config.data.vocab_size=50000"),
        "vocab_size=50000",
    ),
    "parallel lengths": (
        [PARALLEL, "--config.data.files.train=('{files}/three.en.gz', '{files}/two.de.gz')"],
        "3",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_answers_in_one_line(script, files, tmp_path, name):
    arguments, told = CASES[name]
    arguments = [argument.replace("{files}", str(files)) for argument in arguments]
    ended = script(train.main, *arguments, f"--workdir={tmp_path / 'w'}")
    assert told in ended.complaint


@pytest.mark.parametrize(
    "name",
    [
        "longer than positions",
        "unknown field",
        "unknown backend",
        "unknown profile",
        "batch over devices",
        "empty text",
        "parallel lengths",
    ],
)
def test_a_sweep_answers_in_one_line_and_starts_no_cell(script, files, tmp_path, name, monkeypatch):
    monkeypatch.setattr(sweep.local, "run", lambda *_, **__: pytest.fail("cells were started"))
    arguments, told = CASES[name]
    arguments = [argument.replace("{files}", str(files)) for argument in arguments]
    ended = script(sweep.main, *arguments, f"--workdir={tmp_path / 'w'}")
    assert told in ended.complaint


@pytest.mark.parametrize("main", [train.main, sweep.main])
def test_flags_that_are_missing_are_named(script, main):
    assert "--config is missing" in script(main, "--workdir=/tmp/unused").complaint
    assert "--workdir is missing" in script(main, DEFAULT).complaint


def test_a_workdir_of_another_config_is_refused_and_nothing_in_it_changes(script, tmp_path, monkeypatch):
    def train_a_little(parts, **_):
        (parts[0].directory / "metrics.jsonl").write_text("{}\n")
        return ["stopped"]

    monkeypatch.setattr(loop, "train", train_a_little)
    assert script(train.main, DEFAULT, f"--workdir={tmp_path}").code == 75
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    complaint = script(train.main, DEFAULT, "--config.training.steps=21", f"--workdir={tmp_path}").complaint
    assert "holds another sweep" in complaint and "training.steps: 20 -> 21" in complaint
    assert "smoke-num_heads=1-" in script(sweep.main, DEFAULT, f"--workdir={tmp_path}").complaint
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_run_directory_that_is_none_is_told(script, tmp_path):
    assert "is no run directory" in script(train.main, f"--run={tmp_path / 'none'}").complaint


def test_a_run_that_another_process_trains_is_left_to_it(script, tmp_path, monkeypatch):
    def train_twice(parts, **_):
        ended = script(train.main, f"--run={parts[0].directory}")
        assert "is being trained by process" in ended.complaint
        return ["done"]

    monkeypatch.setattr(loop, "train", train_twice)
    assert script(train.main, DEFAULT, f"--workdir={tmp_path}").code == 0


@pytest.mark.parametrize(
    ("seeds", "told"),
    [("9..3", "runs backwards; give 3..9"), ("some", "'some' is no seed"), ("1,1", "seed 1 is there twice")],
)
def test_seeds_that_are_none_are_told_and_nothing_is_made(script, tmp_path, seeds, told):
    assert told in script(sweep.main, DEFAULT, f"--seeds={seeds}", f"--workdir={tmp_path / 'w'}").complaint
    assert not (tmp_path / "w").exists()


def test_seeds_are_added_by_their_flag_alone(script, tmp_path, monkeypatch):
    """A play of a driver: every run is done as soon as it is started."""
    started = []

    def play(packs, **_):
        for run in (run for pack in packs for run in pack if run.state != "done"):
            started.append((run.config["model"]["num_heads"], run.config["seeds"]))
            (run.path / "metrics.jsonl").write_text("")
            run.update(state="done")
        return 0

    monkeypatch.setattr(sweep.local, "run", play)
    monkeypatch.setattr(sweep, "_report", lambda directory, code: code)
    monkeypatch.setattr(preparation, "prepare_data", lambda *_: None)
    arguments = [DEFAULT, f"--workdir={tmp_path}"]
    assert script(sweep.main, *arguments).code == 0
    assert script(sweep.main, *arguments, "--seeds=3,4").code == 0
    assert script(sweep.main, *arguments, "--seeds=0..4").code == 0
    assert script(sweep.main, *arguments).code == 0
    assert started == [(1, [0, 1]), (8, [0, 1]), (1, [3, 4]), (8, [3, 4]), (1, [2]), (8, [2])]
    complaint = script(sweep.main, *arguments, "--config.seeds=(0, 1, 2, 3)").complaint
    assert "with seeds 0,1, and the config says 0..3; to add others, give --seeds=2,3" in complaint
