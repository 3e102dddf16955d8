"""`heads import`: a checkpoint becomes a finished run that opens as any other; what is wrong is one line and code 2."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from experiments import heads
from mha_jax.data.pieces import PieceTokenizer
from mha_jax.pretrained import llama2c
from mha_jax.sweeps.opening import open_run
from tests.pretrained import files


@pytest.fixture
def checkpoint(tmp_path):
    return files.checkpoint(tmp_path / "random.bin")


@pytest.fixture
def tokenizer(tmp_path):
    return files.tokenizer(tmp_path / "tokenizer.bin")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join("abc an bc " * (1 + n % 5) for n in range(90)))
    return path


def arguments(checkpoint, tokenizer, workdir, *more):
    return ["import", f"--from={checkpoint}", f"--tokenizer={tokenizer}", f"--workdir={workdir}", "--length=16", *more]


@pytest.mark.slow
def test_an_imported_run_is_a_finished_run_with_the_weights_of_the_file(script, checkpoint, tokenizer, text, tmp_path):
    asked = arguments(checkpoint, tokenizer, tmp_path / "w", f"--text={text}")
    ended = script(heads.main, *asked)
    assert ended.code == 0, ended.err
    (path,) = (tmp_path / "w" / "runs").iterdir()
    opened = open_run(path)
    assert (opened.directory.state, opened.step, opened.run.seeds) == ("done", 1, (0,))
    assert (path / "tokenizer.bin").read_bytes() == tokenizer.read_bytes()
    jax.tree.map(np.testing.assert_array_equal, opened.trees(0)[0], llama2c.read(checkpoint).params)
    moments = [leaf for leaf in jax.tree.leaves(opened.state["optimizer"])]
    assert moments and not any(np.any(leaf) for leaf in moments)
    report = json.loads((path / "import.json").read_text())
    assert (report["run"], report["notes"]) == ("random.bin", [])
    # As in test_llama2c, whose logits are as large.
    assert len(report["agreement"]["layers"]) == 3
    assert 0 < max(*report["agreement"]["layers"], report["agreement"]["logits"]) < 5e-5
    batches = list(opened.batches())
    assert len(batches) >= 2
    (first,) = opened.data.tokenizer.encode(["abc an bc " * 3])
    stream = np.concatenate([np.asarray(b["targets"])[np.asarray(b["weights"]) > 0] for b in batches])
    assert (stream == opened.data.tokenizer.end).sum() == 22 and stream[-1] == opened.data.tokenizer.end
    assert not np.isin(stream, (0, 2)).any() and first[0] in stream

    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    assert "is there already" in script(heads.main, *asked).complaint
    assert before == {file: file.stat().st_mtime_ns for file in path.rglob("*")}


@pytest.mark.slow
def test_without_a_text_the_model_writes_its_own(script, checkpoint, tokenizer, tmp_path):
    ended = script(heads.main, *arguments(checkpoint, tokenizer, tmp_path / "w"))
    assert ended.code == 0, ended.err
    (written,) = (tmp_path / "w" / "texts").iterdir()
    pieces = PieceTokenizer(epath.Path(tokenizer), 271)
    (path,) = (tmp_path / "w" / "runs").iterdir()
    opened = open_run(path)
    assert opened.config["data"]["files"]["train"] == str(written)
    assert opened.config["parent"]["run"] == "random.bin"
    # A model that knows nothing still draws its own tokens better than one that takes all 271 for equal.
    assert len(pieces.encode([written.read_text()])[0]) > 500
    rows = [
        line for line in (path / "metrics.jsonl").read_text().splitlines() if '"validation", "name": "loss"' in line
    ]
    assert len(rows) == 1


def test_what_is_wrong_with_the_files_is_one_line_and_nothing_is_written(script, checkpoint, tokenizer, tmp_path):
    short, other = tmp_path / "short.bin", tmp_path / "other.bin"
    short.write_bytes(checkpoint.read_bytes()[:-40])
    files.tokenizer(other, files.MERGES[:-1])
    workdir = tmp_path / "w"
    for found, words in (
        (arguments(short, tokenizer, workdir), "has 47140 bytes"),
        (arguments(tokenizer, tokenizer, workdir), "is no llama2.c checkpoint"),
        (arguments(tmp_path / "none.bin", tokenizer, workdir), "is no file"),
        (arguments(checkpoint, checkpoint, workdir), "is no whole llama2.c tokenizer"),
        (arguments(checkpoint, other, workdir), "has 270 pieces; data.vocab_size=271"),
        (arguments(checkpoint, tokenizer, workdir, "--length=20"), "data.length=20 is longer than model.max_length=19"),
        (arguments(checkpoint, tokenizer, workdir, "--text=none.txt"), "data file none.txt does not exist"),
        (["import", f"--from={checkpoint}"], "--tokenizer is missing"),
    ):
        assert words in script(heads.main, *found).complaint
    assert not workdir.exists()
