"""`heads probe` writes what probes read out of a run's heads; bad input is one line, and nothing is written."""

import csv
import json
from pathlib import Path

import pytest

from experiments import heads
from mha_jax.data import conllu
from mha_jax.data.words import word_rows
from mha_jax.heads.probing import probe_all
from mha_jax.heads.word_features import word_features
from mha_jax.sweeps.opening import open_run
from tests.end_to_end.test_heads_importance import create

EWT = Path(__file__).resolve().parents[3] / "shared" / "data" / "ud_english_ewt"
SPLITS = {"treebank": "train", "treebank_dev": "dev", "treebank_test": "test"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sweep")
    (workdir / "text.txt").write_text("\n\n".join(f"line {n} of the text" for n in range(200)))
    return create(
        workdir / "runs" / "text",
        "masked_lm",
        data__files__train=str(workdir / "text.txt"),
        data__validation_fraction=0.3,
        data__length=64,
        model__max_length=64,
    )


@pytest.mark.slow
@pytest.mark.skipif(not EWT.exists(), reason="shared/data/ud_english_ewt is not there")
def test_every_head_of_a_chosen_seed_is_probed_on_a_treebank(script, run):
    files = {flag: str(EWT / f"en_ewt-ud-{split}.conllu.gz") for flag, split in SPLITS.items()}
    given = [f"--{flag}={path}" for flag, path in files.items()]
    ended = script(heads.main, "probe", f"--run={run}", "--seed=1", "--tasks=pos,number", "--max_sentences=50", *given)
    assert ended.code == 0, ended.err
    assert "most selective" in ended.out and "sentences are longer than 64 pieces" in ended.out
    told = json.loads((run / "heads" / "probes.json").read_text())
    assert told["seeds"].keys() == {"1"} and told["seeds"]["1"]["tasks"].keys() == {"pos", "number"}

    opened, found = open_run(run), told["seeds"]["1"]["tasks"]["number"]
    read = [conllu.read(path, 50) for path in files.values()]
    features = [
        word_features(opened.model(1), word_rows(part, opened.data.tokenizer, "masked_lm", 64)) for part in read
    ]
    number = probe_all("number", *features)
    assert found["classes"] == ["Plur", "Sing"] and found["words"]["train"] == number.words[0]
    assert found["majority"] == number.majority
    name = "encoder/1/attention"
    assert found["heads"][name]["accuracy"] == pytest.approx(number.heads[name].accuracy.mean.tolist(), abs=1e-6)
    rows = list(csv.DictReader((run / "heads" / "probes.csv").read_text().splitlines()))
    assert len(rows) == 2 * 8 and {row["task"] for row in rows} == {"pos", "number"}
    assert "What can be read out of heads" in (run / "heads" / "index.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--treebank is missing"),
        (["--treebank=a", "--treebank_dev=b"], "--treebank_test is missing"),
        (["--treebank=a", "--treebank_dev=b", "--treebank_test=c"], "treebank a is no file"),
    ],
)
def test_missing_files_are_told_in_one_line(script, run, arguments, told):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert told in script(heads.main, "probe", f"--run={run}", *arguments).complaint
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
