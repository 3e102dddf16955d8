"""Runs whose weights were trained elsewhere: directories like those of any finished run of one step."""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mha_jax import config as configs
from mha_jax.data import load
from mha_jax.data.tokenizers import Tokenizer
from mha_jax.models.decoding import generate
from mha_jax.specs import RunSpec, UserError
from mha_jax.sweeps.cell import Exit, data_dir, run_cell
from mha_jax.sweeps.children import begin_run
from mha_jax.sweeps.store import RunDirectory
from mha_jax.training.step import State, init_state, merge

_ROWS, _LONGEST = 64, 1024  # texts written at once, tokens of one


def origin(path: epath.PathLike) -> dict[str, Any]:
    """What the config of an imported run says under "parent": its name and the sha256 of the weights' files."""
    source, digest = epath.Path(path), hashlib.sha256()
    for file in sorted(source.glob("*.safetensors")) if source.is_dir() else [source]:
        digest.update(file.read_bytes())
    return {"run": source.name, "surgery": "import", "sha256": digest.hexdigest()}


def imported_state(run: RunSpec, params: Any) -> State:
    """The state after the last step with these params for the run's only seed, and a fresh optimiser."""
    state = init_state(run)
    params = jax.tree.map(lambda leaf, given: jnp.asarray(given, leaf.dtype)[None], state["params"], params)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, state["params"])
    return {**state, "params": params, "step": jnp.full_like(state["step"], run.training.steps)}


def write_imported(workdir: epath.PathLike, config: ConfigDict | Mapping[str, Any], params: Any) -> RunDirectory:
    """A new run directory WORKDIR/runs/NAME-HASH with the params as its last checkpoint, evaluated on its data.

    Raises: UserError where that directory is there already, or the data is at fault.
    """
    directory = RunDirectory(epath.Path(workdir) / "runs" / configs.run_id(config, {}))
    if (directory.path / "config.json").exists():
        raise UserError(f"{directory.path} is there already; remove it, or name another --workdir")
    run = configs.resolve(config)
    state = imported_state(run, params)
    load(run.data, run.task, data_dir(run, directory.workdir))  # what is wrong with it shows before anything is written
    directory = begin_run(directory.path, config, run.training.steps, state)
    if run_cell(directory, progress=False) != Exit.DONE:
        raise UserError(directory.failure)
    return directory


def own_texts(run: RunSpec, params: Any, tokenizer: Tokenizer, count: int, seed: int = 0) -> list[str]:
    """Texts that an imported language model writes from its start token on, each token drawn from its probabilities.

    A text ends where the model ends it, or after model.max_length tokens, at most 1024; blank lines, which part
    texts, are left out.
    """
    state = imported_state(run, params)
    model = merge(run, *jax.tree.map(lambda leaf: leaf[0], (state["params"], state["constants"])))
    length, never = min(run.model.max_length, _LONGEST), tuple(tokenizer.specials)
    write = jax.jit(functools.partial(generate, max_length=length, end=tokenizer.end, never=never))
    rows = min(count, _ROWS)
    prompts, lengths = jnp.full((rows, 1), tokenizer.start), jnp.ones(rows, int)
    texts: list[str] = []
    for number in range(-(-count // rows)):
        tokens = write(model, prompts, lengths, key=jax.random.fold_in(jax.random.key(seed), number))
        texts += [tokenizer.decode(_until(row[1:], tokenizer.end)) for row in np.asarray(tokens)]
    return ["\n".join(line for line in text.split("\n") if line.strip()) for text in texts[:count]]


def _until(row: np.ndarray, end: int) -> np.ndarray:
    """The tokens before the first `end`: what pads a row behind it can be a token of the text's own vocabulary."""
    return row[: np.flatnonzero(row == end)[0]] if (row == end).any() else row
