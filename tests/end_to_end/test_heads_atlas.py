"""The verb `atlas` from a run to its page, and what it refuses."""

import pytest

from experiments import heads
from mha_jax.sweeps.store import RunDirectory, write_json
from tests.end_to_end.test_heads_importance import create
from tests.training.test_loop import TEXT


@pytest.mark.slow
def test_atlas_of_a_run_has_its_heads_and_what_other_verbs_found(script, tmp_path):
    (tmp_path / "corpus.txt").write_text(TEXT * 3)
    data = {"data__files__train": str(tmp_path / "corpus.txt"), "data__validation_fraction": 0.3}
    run = RunDirectory(create(tmp_path / "runs" / "tiny", "lm", **data))
    count = run.config["model"]["num_heads"]
    own = {"heads": count, "role": ["induction"] * count, "roles": [["induction"]] * count, "scores": {}}
    one = {"attentions": {"decoder/0/attention": own}, "relations": [], "coreference": []}
    write_json(run.path / "heads" / "roles.json", {"seeds": {"0": one}, "seed_counts": {}, "thresholds": {}})
    ended = script(heads.main, "atlas", f"--run={run.path}", "--text=a text")
    assert ended.code == 0, ended.err
    page = (run.path / "heads" / "atlas.html").read_text()
    assert page.count("<b>induction</b>") == count and "seed 0 · maps of text" in page and "nats" in page
    assert (run.path / "heads" / "atlas.svg").exists() and (run.path / "heads" / "index.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--run is missing"),
        (("--run=DIR", "--examples=0,1"), "--examples=0,1 are 2; an atlas shows one text"),
        (("--run=DIR", "--batches=0"), "flag --batches=0"),
        (("--run=DIR",), "DIR is no run directory"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(script, tmp_path, arguments, message):
    given = [argument.replace("DIR", str(tmp_path / "DIR")) for argument in arguments]
    assert message in script(heads.main, "atlas", *given).complaint
    assert not (tmp_path / "DIR").exists()
