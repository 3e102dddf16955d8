"""llama2.c's checkpoints: logits against its forward pass in NumPy, the published text, files that are none."""

import functools
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from configs import default
from mha_jax.config import override, resolve
from mha_jax.data.pieces import PieceTokenizer
from mha_jax.models import generate
from mha_jax.models.cost import parameters
from mha_jax.models.transformer import LanguageModel
from mha_jax.pretrained import llama2c
from mha_jax.specs import BOS, RunSpec, UserError
from mha_jax.sweeps.imported import imported_state
from mha_jax.training.step import merge
from tests.pretrained import files

# Measured: 1.4e-5 for the random model and 1.2e-5 for stories260K, whose logits reach 22. With an epsilon of 1e-6 for
# 1e-5 they are 9e-4 and 1.4e-3 off.
TOLERANCE = 5e-5


def run_of(checkpoint: llama2c.Llama2c) -> RunSpec:
    values = {f"model.{name}": value for name, value in checkpoint.model.items()} | {"seeds": (0,), "data.length": 16}
    values |= {"data.tokenizer": "llama2c", "data.tokenizer_file": "unused", "data.vocab_size": None}
    return resolve(override(default.get_config(), values | {"data.vocab_size": checkpoint.sizes["vocab_size"]}))


def model_of(checkpoint: llama2c.Llama2c) -> LanguageModel:
    run = run_of(checkpoint)
    state = imported_state(run, checkpoint.params)
    return merge(run, *jax.tree.map(lambda leaf: leaf[0], (state["params"], state["constants"])))


def difference(model: LanguageModel, sizes: tuple[int, ...], weights: dict, tokens_T: np.ndarray) -> float:
    logits_TC = jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(tokens_T)[None])[0]
    return float(np.abs(np.asarray(logits_TC) - files.forward(sizes, weights, tokens_T)).max())


@pytest.fixture(scope="module")
def stories(stories260k: Path) -> llama2c.Llama2c:
    return llama2c.read(stories260k / "stories260K.bin")


@pytest.fixture(scope="module")
def golden_ids(stories260k: Path) -> np.ndarray:
    return np.array((stories260k / "golden_greedy_ids.txt").read_text().split(), np.int32)


def test_logits_are_those_of_the_forward_pass_in_float64(tmp_path: Path):
    checkpoint = llama2c.read(files.checkpoint(tmp_path / "random.bin"))
    tokens_T = np.random.default_rng(1).integers(0, 271, 17)
    assert difference(model_of(checkpoint), files.SIZES, files.arrays(), tokens_T) < TOLERANCE


@pytest.mark.parametrize("vocabulary", [271, -271], ids=["tied", "untied"])
def test_the_forward_pass_that_imports_are_compared_with_is_llama2cs(tmp_path: Path, vocabulary: int):
    sizes = (*files.SIZES[:5], vocabulary, files.SIZES[6])
    checkpoint = llama2c.read(files.checkpoint(tmp_path / "random.bin", sizes))
    tokens_T = np.random.default_rng(1).integers(0, 271, 17)
    states = checkpoint.hidden_states(tokens_T)
    assert len(states) == 2 + 2 and checkpoint.tied == ("output" not in checkpoint.params["tokens"]) == (vocabulary > 0)
    np.testing.assert_allclose(states[-1], files.forward(sizes, files.arrays(sizes), tokens_T), rtol=0, atol=1e-10)


@pytest.mark.slow
def test_an_output_table_of_its_own_is_read(tmp_path: Path):
    sizes = (*files.SIZES[:5], -271, files.SIZES[6])
    checkpoint = llama2c.read(files.checkpoint(tmp_path / "random.bin", sizes))
    tokens_T = np.random.default_rng(1).integers(0, 271, 17)
    assert difference(model_of(checkpoint), sizes, files.arrays(sizes), tokens_T) < TOLERANCE


@pytest.mark.slow
def test_logits_of_stories260k_are_those_of_the_forward_pass(stories: llama2c.Llama2c, golden_ids: np.ndarray):
    sizes = tuple(stories.sizes[name] for name in llama2c.FIELDS)
    assert difference(model_of(stories), sizes, stories.arrays, golden_ids[:61]) < TOLERANCE


def test_stories260k_writes_its_published_text(stories: llama2c.Llama2c, stories260k: Path, golden_ids: np.ndarray):
    write = jax.jit(functools.partial(generate, max_length=len(golden_ids) + 3, end=BOS))
    written = np.asarray(write(model_of(stories), jnp.array([[BOS]]), jnp.array([1])))[0]
    # After the published ids comes the start token of another story, which ends this one.
    np.testing.assert_array_equal(written, [*golden_ids, BOS, 0, 0])


def test_the_published_text_has_its_published_ids(stories260k: Path, golden_ids: np.ndarray):
    pieces = PieceTokenizer(epath.Path(stories260k / "tok512.bin"), 512)
    text = (stories260k / "golden_greedy.txt").read_text().removesuffix("\n")
    np.testing.assert_array_equal(pieces.encode([text])[0], golden_ids[1:257])
    assert pieces.decode(golden_ids[:257]) == text


def test_a_head_is_where_it_is_in_the_file(tmp_path: Path):
    checkpoint, weights = llama2c.read(files.checkpoint(tmp_path / "random.bin")), files.arrays()
    attention = checkpoint.params["decoder"]["blocks"][1]["attention"]
    np.testing.assert_array_equal(attention["query"]["kernel"][:, 3], weights["wq"][1][12:16].T)
    np.testing.assert_array_equal(attention["out"]["kernel"][3], weights["wo"][1][:, 12:16].T)
    assert attention["key"]["kernel"].shape == attention["value"]["kernel"].shape == (24, 2, 4)


def test_stories260k_has_the_published_number_of_parameters(stories: llama2c.Llama2c):
    assert parameters(run_of(stories)) == sum(x.size for x in jax.tree.leaves(stories.params)) == 260_032


def header(*sizes: int) -> bytes:
    return struct.pack("<7i", *sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: b"", "has 0 bytes, fewer than the header"),
        (lambda raw: raw[:-4], r"has \d+ bytes; .*\(d_model=24, .*\) has \d+"),
        (lambda raw: raw + b"\0", r"has \d+ bytes; .* has \d+"),
        (lambda raw: b"Once upon a time, there was a little girl.", "is no llama2.c checkpoint"),
        (lambda raw: header(24, 14, 2, 7, 1, 271, 19) + raw[28:], "is no llama2.c checkpoint"),
        (lambda raw: header(24, 14, 2, 6, 2, -271, 19) + raw[28:], r"has \d+ bytes; .* has \d+"),
        (lambda raw: raw[:28] + struct.pack("<f", float("nan")) + raw[32:], "embedding holds numbers .* not finite"),
    ],
    ids=["empty", "truncated", "longer", "text", "odd heads", "untied", "not finite"],
)
def test_a_file_that_is_no_whole_checkpoint_is_refused(tmp_path: Path, change, message: str):
    file = files.checkpoint(tmp_path / "random.bin")
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        llama2c.read(file)
    assert "\n" not in str(caught.value)


def test_a_file_that_does_not_exist_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="is no file"):
        llama2c.read(tmp_path / "none.bin")
