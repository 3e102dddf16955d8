"""Verbs of `experiments.heads` on imported runs: all on a BERT without a head, some on a GPT-2 with an output table."""

import json

import jax
import numpy as np
import pytest

from experiments import heads
from mha_jax.pretrained import families
from mha_jax.sweeps.opening import open_run
from tests.end_to_end.test_heads_export import PIECES, imported
from tests.pretrained import checkpoints

WORDS = {"NOUN": ("abc", "cad", "bag"), "VERB": ("fgh", "gij"), "DET": ("a",)}
LENGTH = 16


def bert(folder):
    checkpoints.headless(folder, "bert", len(PIECES), num_hidden_layers=1)
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    return folder


def gpt2(folder):
    names = {letter: number for number, letter in enumerate([*"abcdefghij", "Ġ", "Ċ", "ab", "Ġa", "<|endoftext|>"])}
    checkpoints.checkpoint(folder, "gpt2_untied", len(names), n_layer=1)
    (folder / "vocab.json").write_text(json.dumps(names))
    (folder / "merges.txt").write_text("#version: 0.2\na b\nĠ a\n")
    return folder


def treebank(file, seed):
    """Sentences "a NOUN VERB": the determiner depends on the noun, the noun on the verb."""
    rng, lines = np.random.default_rng(seed), []
    for number in range(30):
        lines.append(f"# sent_id = {number}")
        rows = zip(("DET", "NOUN", "VERB"), (2, 3, 0), ("det", "nsubj", "root"), strict=True)
        for place, (kind, head, relation) in enumerate(rows, 1):
            form = rng.choice(WORDS[kind])
            lines.append(f"{place}\t{form}\t{form}\t{kind}\t_\t_\t{head}\t{relation}\t_\t_")
        lines.append("")
    file.write_text("\n".join(lines) + "\n")
    return file


def looks(treebanks):
    """The verbs that look, with flags that keep them short."""
    train, dev, test = treebanks
    return {
        "importance": ["--measures=gradient_normalised", "--batches=2"],
        "curve": ["--points=3", "--draws=1", "--limit=1"],
        "redundancy": ["--measure=cka", "--batches=2"],
        "roles": [f"--treebank={dev}", f"--treebank_test={test}", "--max_examples=30"],
        "probe": [f"--treebank={train}", f"--treebank_dev={dev}", f"--treebank_test={test}", "--tasks=pos"],
        "atlas": ["--batches=1"],
        "maps": ["--text=a cad", "--flow_tokens=0"],
        "capture": ["--what=weights", "--heads=0,2"],
    }


def check_what_was_found(path, name, verbs):
    """Each verb has seen every head of the one attention."""
    told = {verb: json.loads((path / "heads" / f"{verb}.json").read_text()) for verb in ("importance", "curve")}
    found = told["importance"]["seeds"]["0"]["gradient_normalised"]["heads"]
    assert found.keys() == {name} and len(found[name]["mean"]) == 3
    assert {row["left"] for row in told["curve"]["rows"]} == {3, 2, 1, 0}
    probes = json.loads((path / "heads" / "probes.json").read_text())["seeds"]["0"]["tasks"]["pos"]
    assert probes["classes"] == ["DET", "NOUN", "VERB"] and probes["words"]["test"] == 90
    assert probes["heads"].keys() == {name}
    if "roles" in verbs:
        own = json.loads((path / "heads" / "roles.json").read_text())["seeds"]["0"]
        assert own["attentions"].keys() == {name} and {row["relation"] for row in own["relations"]} >= {"det", "nsubj"}
    if "capture" in verbs:
        with np.load(path / "heads" / "capture" / "validation-0.npz") as arrays:
            weights = arrays[f"{name}/weights"]
        assert len(weights) == 2
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)  # float32
    for page in ("index", "atlas", "maps"):
        assert (path / "heads" / f"{page}.html").stat().st_size > 10_000


def child_of(script, path, verb, *flags):
    """The run that a verb makes, and what it says of it."""
    before = set(path.parent.iterdir())
    ended = script(heads.main, verb, f"--run={path}", "--noprogress", *flags)
    assert ended.code == 0, ended.err
    (child,) = set(path.parent.iterdir()) - before
    return child, json.loads((child / "heads" / f"{verb}.json").read_text())


def check_export(script, pruned, out):
    """What is exported of a run that has lost a head is what it is."""
    ended = script(heads.main, "export", f"--run={pruned}", f"--out={out}")
    assert ended.code == 0, ended.err
    again, opened = families.read(out), open_run(pruned)
    jax.tree.map(np.testing.assert_array_equal, opened.trees(0)[0], again.params)
    shapes = json.loads((out / "config.json").read_text())["mha_jax"]["heads"]
    assert [(shape["num_heads"], shape["qk_dim"]) for shape in shapes] == [(2, 4)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "kind", "left_out"),
    # What reads neither words nor logits does not see what a family has of its own.
    [(bert, "encoder", ()), (gpt2, "decoder", ("redundancy", "roles", "capture", "grow"))],
    ids=["bert", "gpt2"],
)
def test_verbs_run_on_an_imported_run(script, tmp_path, write, kind, left_out):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join("abc ab cad " * (1 + n % 4) for n in range(60)))
    path = imported(script, write(tmp_path / "checkpoint"), tmp_path / "w", f"--text={text}")
    treebanks = [treebank(tmp_path / f"{seed}.conllu", seed) for seed in range(3)]
    looked = {verb: flags for verb, flags in looks(treebanks).items() if verb not in left_out}
    for verb, flags in looked.items():
        ended = script(heads.main, verb, f"--run={path}", *flags)
        assert ended.code == 0, (verb, ended.err)
    check_what_was_found(path, f"{kind}/0/attention", looked)
    (note,) = json.loads((path / "import.json").read_text())["notes"] or ["as in the file"]
    assert ("put there" in note) == (write is bert)

    pruned, told = child_of(script, path, "prune", "--count=1")
    assert told["heads"]["after"] == {f"{kind}/0/attention": 2} and told["parent"]["run"] == path.name
    if "grow" not in left_out:
        _, told = child_of(script, path, "grow", "--add=1")
        # Exact but for the rounding of float32 sums over more heads.
        assert told["validation"]["after"]["loss"] == pytest.approx(told["validation"]["before"]["loss"], abs=1e-5)
    check_export(script, pruned, tmp_path / "out")
