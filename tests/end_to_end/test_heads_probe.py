"""`heads probe` writes what probes read out of a run's heads; bad input is one line, and nothing is written."""

import csv
import json
from pathlib import Path

import pytest

from experiments import heads
from mha_jax.data import conllu
from mha_jax.data.words import word_rows
from mha_jax.heads import probing
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
    assert told["seeds"]["1"]["graph"] is None and found["embedding"]["bits"] is None


@pytest.mark.slow
@pytest.mark.skipif(not EWT.exists(), reason="shared/data/ud_english_ewt is not there")
def test_the_graph_codes_and_labels_of_sentences_come_where_they_are_asked_for(script, run, tmp_path, monkeypatch):
    monkeypatch.setattr(probing, "PORTIONS", (0.25, 1.0))  # each portion is a program of its own to compile
    given = [f"--{flag}={EWT / f'en_ewt-ud-{split}.conllu.gz'}" for flag, split in SPLITS.items()]
    for part, count in (("labels", 60), ("labels_dev", 30), ("labels_test", 30)):
        lines = (f"{'long' if n % 3 else 'short'}\ttext {'and more ' * (n % 3)}{n}\n" for n in range(count))
        (tmp_path / f"{part}.tsv").write_text("".join(lines))
        given.append(f"--{part}={tmp_path / part}.tsv")
    ended = script(
        heads.main,
        "probe",
        f"--run={run}",
        "--seed=1",
        "--tasks=number",
        "--max_sentences=50",
        "--graph",
        "--mdl",
        *given,
    )
    assert ended.code == 0, ended.err
    assert "times shorter" in ended.out and "right-branching" in ended.out
    one = json.loads((run / "heads" / "probes.json").read_text())["seeds"]["1"]
    assert one["tasks"].keys() == {"number", "label"}
    assert one["tasks"]["label"]["words"] == {"train": 50, "dev": 30, "test": 30}
    assert one["tasks"]["label"]["classes"] == ["long", "short"]
    for task in one["tasks"].values():
        assert all(bits > 0 for own in task["heads"].values() for bits in own["bits"])
    graph = one["graph"]
    words = [conllu.read(EWT / f"en_ewt-ud-{split}.conllu.gz", 50) for split in ("train", "test")]
    tokenizer = open_run(run).data.tokenizer
    kept = [word_rows(sentences, tokenizer, "masked_lm", 64).sentences for sentences in words]
    scored = [[w for s in part for w in s.words if w.head >= 0 and w.relation != "punct"] for part in kept]
    assert graph["words"] == {"train": len(scored[0]), "test": len(scored[1])}
    # Right-branching by its own definition.
    nexts = [w.head == i + 1 for s in kept[1] for i, w in enumerate(s.words) if w.head >= 0 and w.relation != "punct"]
    assert graph["right_branching"]["mean"] == pytest.approx(sum(nexts) / len(nexts), abs=1e-6)
    assert {name: len(w) for name, w in graph["w"].items()} == {"encoder/0/attention": 4, "encoder/1/attention": 4}
    page = (run / "heads" / "index.html").read_text()
    assert "A parser of all attention maps" in page and "Online code" in page


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--treebank is missing"),
        (["--treebank=a", "--treebank_dev=b"], "--treebank_test is missing"),
        (["--treebank=a", "--treebank_dev=b", "--treebank_test=c"], "treebank a is no file"),
        (["--labels=a", "--labels_dev=b"], "--labels_test is missing"),
        (["--labels=a", "--labels_dev=b", "--labels_test=c", "--graph"], "--graph needs --treebank"),
    ],
)
def test_missing_files_are_told_in_one_line(script, run, arguments, told):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert told in script(heads.main, "probe", f"--run={run}", *arguments).complaint
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
