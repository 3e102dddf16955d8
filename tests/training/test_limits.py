"""A run that crosses a limit of its validation loss is given up there; what trains beside it goes on."""

import pytest
from etils import epath

from mha_jax import config as configs
from mha_jax.sweeps import cell
from mha_jax.sweeps.store import RunDirectory
from mha_jax.training import loop
from mha_jax.training.limits import GivenUp, read_limits, write_limits
from mha_jax.training.metrics import read_metrics
from tests import tiny


def test_limits_are_read_as_written_and_empty_where_there_are_none(tmp_path):
    assert read_limits(tmp_path) == {}
    write_limits(tmp_path, {100: 2.5, 200: 1.25})
    assert read_limits(tmp_path) == {100: 2.5, 200: 1.25}


def test_what_was_given_up_is_done_and_says_why(tmp_path):
    directory = RunDirectory(tmp_path)
    assert cell._settle(directory, GivenUp("validation loss 3.0000 at step 10, limit 2.5000")) == cell.Exit.DONE
    assert directory.state == "done" and directory.status["pruned"].startswith("validation loss 3.0000 at step 10")


@pytest.mark.slow
def test_a_run_over_its_limit_is_given_up_and_its_neighbour_goes_on(tmp_path):
    (tmp_path / "corpus.txt").write_text("the cat sat on the mat\n\nthe old dog sat on the hat\n\n" * 20)
    files = {"data__files__train": str(tmp_path / "corpus.txt"), "mesh__data": 1, "model__num_layers": 1}
    facts = {"hopeless": {}, "other": {}}
    parts = []
    for name, rate in (("hopeless", 1e-5), ("other", 3e-3)):
        (tmp_path / name).mkdir()
        write_limits(tmp_path / name, {10: 0.5} if name == "hopeless" else {10: 50.0})
        config = tiny.config("lm", seeds=(0,), optimizer__learning_rate=rate, **files)
        parts.append(loop.Part(config, configs.resolve(config), epath.Path(tmp_path / name), facts[name].update))
    cache = epath.Path(tmp_path / "cache")
    outcomes = loop.train(parts, cache_dir=cache, should_stop=lambda: False, progress=False)
    assert isinstance(outcomes[0], GivenUp) and "at step 10, limit 0.5000" in str(outcomes[0])
    assert outcomes[1] == "done" and facts["hopeless"]["step"] == 10

    def evaluated(name):
        rows, _ = read_metrics(tmp_path / name / "metrics.jsonl")
        return [row["step"] for row in rows if (row["split"], row["name"]) == ("validation", "loss")]

    assert (evaluated("hopeless"), evaluated("other")) == ([10], [10, 20])
