"""`heads maps` and `heads capture` from a trained run to their files, and what they refuse."""

import json

import numpy as np
import pytest

from experiments import heads
from mha_jax.heads.capture import kind_of
from tests.end_to_end.test_heads_importance import KINDS, pair_run, text_run, workdir  # noqa: F401 (fixtures)


@pytest.mark.slow
def test_maps_are_a_page_and_pictures_of_each_attention(script, pair_run):  # noqa: F811
    ended = script(heads.main, "maps", f"--run={pair_run}", "--source=ein Hund", "--target=a d", f"--other={pair_run}")
    assert ended.code == 0, ended.err
    text = (pair_run / "heads" / "maps.html").read_text()
    assert text.count('"attention":"decoder/0/cross_attention"') == 2 * (KINDS["cross"] + 1)
    pictures = {path.name for path in (pair_run / "heads" / "maps").iterdir()}
    names = ("encoder-0-attention", "decoder-0-attention", "decoder-0-cross_attention")
    assert pictures == {f"{name}-text.{form}" for name in names for form in ("svg", "pdf")}
    assert 'href="maps.html"' in (pair_run / "heads" / "index.html").read_text()


@pytest.mark.slow
def test_captured_tensors_are_arrays_beside_their_tokens(script, pair_run):  # noqa: F811
    what = "weights,head_output,head_output_residual"
    ended = script(heads.main, "capture", f"--run={pair_run}", f"--what={what}", "--heads=0", "--examples=2,0")
    assert ended.code == 0, ended.err
    directory = pair_run / "heads" / "capture"
    told = json.loads((directory / "capture.json").read_text())
    assert (told["seed"], told["split"], told["heads"]) == (0, "validation", [0])
    assert [one["name"] for one in told["texts"]] == ["validation 2", "validation 0"]
    for one in told["texts"]:
        with np.load(directory / one["file"]) as arrays:
            assert {name: list(arrays[name].shape) for name in arrays} == one["shapes"]
            for attention in told["layers"]:
                weights = arrays[f"{attention}/weights"]
                queries = one["tokens"]["encoder" if kind_of(attention) == "encoder" else "decoder"]
                assert weights.shape[:2] == (1, len(queries))
                np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
                assert arrays[f"{attention}/head_output_residual"].shape == (len(queries), 1, 12)


@pytest.mark.parametrize(
    ("verb", "arguments", "told"),
    [
        ("maps", ["--heads=9"], "decoder/0/attention has no head 9; there are 4, 0 to 3"),
        ("maps", ["--layers=decoder/7/attention"], "there is no attention 'decoder/7/attention'"),
        ("maps", ["--text=ab", "--source=a", "--target=b"], "give --text, or --source and --target"),
        ("maps", ["--source=a"], "give --text, or --source and --target"),
        ("maps", [f"--text={'long ' * 9}"], "the text has 46 tokens with those around it; the model reads at most 16"),
        ("maps", ["--residual=2"], "--residual=2 must lie between 0 and 1"),
        ("maps", ["--other=nowhere"], "nowhere is no run directory"),
        ("capture", ["--what=logit"], "--what has 'logit'; there are logits, weights"),
        ("capture", ["--heads=a"], "--heads=a is not understood; it reads 0,3"),
        ("capture", ["--examples=-1"], "--examples=-1 is not understood; it reads 0,3"),
        ("capture", ["--examples=100000"], "validation has no example 100000; there are"),
        ("capture", ["--split=night"], "has no split 'night'"),
    ],
)
def test_mistake_is_one_line_and_nothing_is_written(script, text_run, verb, arguments, told):  # noqa: F811
    assert told in script(heads.main, verb, f"--run={text_run}", *arguments).complaint
    assert not (text_run / "heads").exists()


def test_a_run_must_be_given(script):
    for verb in ("maps", "capture"):
        assert "--run is missing" in script(heads.main, verb).complaint
