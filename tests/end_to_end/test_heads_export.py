"""`heads import` of safetensors directories, `heads export`, and what is trained on after: GPT-2 and BERT, tiny."""

import json

import jax
import numpy as np
import pytest

from experiments import heads, train
from mha_jax import config as configs
from mha_jax.pretrained import families
from mha_jax.sweeps.opening import open_run
from mha_jax.sweeps.store import RunDirectory
from mha_jax.training.finished import parent_state, with_parent
from mha_jax.training.metrics import read_metrics
from mha_jax.training.step import init_state
from tests.pretrained import checkpoints

PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", *(f"##{letter}" for letter in "abcdefghij"))


@pytest.fixture
def bert(tmp_path):
    folder = checkpoints.checkpoint(tmp_path / "bert", "bert", len(PIECES))
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    return folder


@pytest.fixture
def gpt2(tmp_path):
    names = {letter: number for number, letter in enumerate([*"abcdefghij", "Ġ", "Ċ", "ab", "Ġa", "<|endoftext|>"])}
    folder = checkpoints.checkpoint(tmp_path / "gpt2", "gpt2", len(names))
    (folder / "vocab.json").write_text(json.dumps(names))
    (folder / "merges.txt").write_text("#version: 0.2\na b\nĠ a\n")
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join("abc ab cad " * (1 + n % 4) for n in range(60)))
    return path


def imported(script, folder, workdir, *more):
    """The run that an import makes."""
    ended = script(heads.main, "import", f"--from={folder}", f"--workdir={workdir}", "--length=16", *more)
    assert ended.code == 0, ended.err
    (path,) = (workdir / "runs").iterdir()
    return path


def check_round_trip(script, path, text, place):
    """Exports a run and imports that: the same heads and params."""
    ended = script(heads.main, "export", f"--run={path}", f"--out={place / 'out'}")
    assert ended.code == 0, ended.err
    again, first = open_run(imported(script, place / "out", place / "again", f"--text={text}")), open_run(path)
    (kind,) = {"lm": ("decoder",), "masked_lm": ("encoder",)}[first.run.task]
    assert again.run.model.heads(kind) == first.run.model.heads(kind)
    jax.tree.map(np.testing.assert_array_equal, again.trees(0)[0], first.trees(0)[0])
    assert max(json.loads((again.directory.path / "import.json").read_text())["agreement"]["layers"]) < 1e-5


@pytest.mark.slow
def test_gpt2_writes_all_its_letters_is_pruned_exported_and_imported_again(script, gpt2, text, tmp_path):
    path = imported(script, gpt2, tmp_path / "w")
    (written,) = (tmp_path / "w" / "texts").iterdir()
    # Ids 0, 1 and 3, which stand for padding, start and mask in the vocabularies made here.
    assert all(written.read_text().count(letter) > 20 for letter in "abd")
    assert "<|endoftext|>" not in written.read_text()
    jax.tree.map(np.testing.assert_array_equal, open_run(path).trees(0)[0], families.read(gpt2).params)
    report = json.loads((path / "import.json").read_text())["agreement"]
    assert len(report["layers"]) == 3 and max(*report["layers"], report["logits"]) < 1e-5  # as in test_families
    gone = "decoder/0/attention:0,1,2;decoder/1/attention:1"
    ended = script(heads.main, "prune", f"--run={path}", f"--heads={gone}", "--steps=0")
    assert ended.code == 0, ended.err
    (pruned,) = [run for run in (tmp_path / "w" / "runs").iterdir() if run != path]
    check_round_trip(script, pruned, text, tmp_path)
    assert [one["num_heads"] for one in json.loads((tmp_path / "out/config.json").read_text())["mha_jax"]["heads"]] == [
        0,
        2,
    ]


@pytest.mark.slow
def test_a_classifier_starts_from_an_imported_bert(script, bert, text, tmp_path):
    parent = imported(script, bert, tmp_path / "w", f"--text={text}")
    check_round_trip(script, parent, text, tmp_path)
    labelled = tmp_path / "labelled.tsv"
    labelled.write_text("".join(f"yes\tabc ab {'a' * (n % 3)}\nno\tfgh gj {'g' * (n % 3)}\n" for n in range(40)))
    values = {"data.files.train": labelled, "data.num_classes": 2, "seeds": "(3,5)", "training.steps": 20}
    values |= {"mesh.data": 1, "training.log_every": 1, "optimizer.warmup_steps": 0, "optimizer.learning_rate": 1e-2}
    given = [f"--config.{name}={value}" for name, value in values.items()]
    where = [f"--config=configs/finetune.py:{parent}", f"--workdir={tmp_path / 'tuned'}", "--noprogress"]
    ended = script(train.main, *where, *given)
    assert ended.code == 0, ended.err
    (path,) = (tmp_path / "tuned" / "runs").iterdir()
    run = configs.resolve(RunDirectory(path).config)
    assert run.model.pooling == "first" and run.seeds == (3, 5)
    start = with_parent(jax.jit(lambda: init_state(run))(), parent_state(run))
    for part in ("tokens", "encoder"):
        for seed in range(2):
            own = jax.tree.map(lambda leaf, seed=seed: leaf[seed], start["params"][part])
            jax.tree.map(np.testing.assert_array_equal, own, families.read(bert).params[part])
    rows = read_metrics(path / "metrics.jsonl")[0]
    losses = [row["value"] for row in rows if (row["split"], row["name"]) == ("train", "loss")]
    assert len(losses) == 2 * 20 and np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


def test_what_is_wrong_is_one_line_and_nothing_is_written(script, bert, tmp_path):
    asked = ["import", f"--from={bert}", f"--workdir={tmp_path / 'w'}", "--length=16"]
    assert "--text is missing" in script(heads.main, *asked).complaint
    (bert / "vocab.txt").write_text("\n".join(PIECES[:-1]) + "\n")
    assert "has 24 tokens; data.vocab_size=25" in script(heads.main, *asked).complaint
    (bert / "vocab.txt").unlink()
    assert "--tokenizer is missing" in script(heads.main, *asked).complaint
    assert "--run is missing" in script(heads.main, "export", f"--out={tmp_path / 'w'}").complaint
    assert not (tmp_path / "w").exists()
