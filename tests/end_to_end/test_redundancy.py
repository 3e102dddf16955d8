"""The verb `redundancy` from a run to its files, and what it refuses."""

import json
import shutil

import pytest

from experiments import heads
from tests.end_to_end.test_heads_importance import create
from tests.training.test_loop import TEXT


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two seeds, where a sweep would put it."""
    folder = tmp_path_factory.mktemp("redundancy")
    (folder / "corpus.txt").write_text(TEXT * 3)
    data = {"data__files__train": str(folder / "corpus.txt"), "data__validation_fraction": 0.3}
    return create(folder / "runs" / "tiny", "lm", **data)


@pytest.mark.slow
def test_files_and_page_of_a_run_and_another_on_the_same_data(run, script):
    other = run.parent / "other"
    shutil.copytree(run, other)
    ended = script(heads.main, "redundancy", f"--run={run}", f"--other={other}", "--batches=2", "--measure=cka")
    assert ended.code == 0, ended.err
    names = {path.name for path in (run / "heads").iterdir()}
    assert names == {"index.html"} | {f"redundancy.{form}" for form in ("json", "csv", "svg", "png")}
    told = json.loads((run / "heads" / "redundancy.json").read_text())
    models = {one["between"][1]: one["matching"] for one in told["matchings"] if one["between"][0] == "seed 0"}
    assert set(models) == {"seed 1", "other seed 0"}
    assert models["other seed 0"]["matched"] == pytest.approx(1, abs=1e-4)
    assert all(one == another for one, another in models["other seed 0"]["pairs"])
    assert models["seed 1"]["matched"] < 0.99
    assert told["suggestions"] and f"most alike by {told['found_by']}" in ended.out
    assert "no seed 7" in script(heads.main, "redundancy", f"--run={run}", "--seed=7").complaint
    assert "no split 'night'" in script(heads.main, "redundancy", f"--run={run}", "--split=night").complaint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--run is missing"),
        (("--run=DIR", "--batches=1"), "--batches=1 gives no error bar; give at least 2"),
        (("--run=DIR", "--measure=cos"), "--measure=cos is unknown; known are js, cka, angles, weights and all"),
        (("--run=DIR", "--cut=1.5"), "--cut=1.5 is no distance between heads; it goes from 0 to 1"),
        (("--run=DIR",), "DIR is no run directory"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(script, tmp_path, arguments, message):
    given = [argument.replace("DIR", str(tmp_path / "DIR")) for argument in arguments]
    assert message in script(heads.main, "redundancy", *given).complaint
    assert not (tmp_path / "DIR").exists()
