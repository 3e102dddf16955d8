"""Opens a finished run to look into it: its config, its trained state, a model for each seed, batches of its splits."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mha_jax import config as configs
from mha_jax.data import Data, load
from mha_jax.heads.capture import Batch
from mha_jax.models.transformer import Model
from mha_jax.specs import RunSpec, UserError
from mha_jax.sweeps.cell import data_dir
from mha_jax.sweeps.store import RunDirectory
from mha_jax.training.finished import restore_finished
from mha_jax.training.step import State, merge


@dataclasses.dataclass(frozen=True)
class OpenedRun:
    """A finished run. `state` leads with the seed axis R everywhere, as training leaves it.

    `params` are those that the run's table was computed with: averaged over checkpoints where the config says so.
    """

    directory: RunDirectory
    config: dict[str, Any]
    run: RunSpec
    step: int
    state: State
    params: Any

    def model(self, seed: int) -> Model:
        """The trained model of one seed. Raises: UserError for a seed that the run did not train."""
        params, constants = self.trees(seed)
        return merge(self.run, params, constants)

    def trees(self, seed: int) -> tuple[Any, Any]:
        """Params and constants of one seed, without the seed axis."""
        if seed not in self.run.seeds:
            raise UserError(f"run {self.directory.run_id} has no seed {seed}; it has {list(self.run.seeds)}")
        index = self.run.seeds.index(seed)
        return jax.tree.map(lambda leaf: leaf[index], (self.params, self.state["constants"]))

    @functools.cached_property
    def data(self) -> Data:
        """The run's data, prepared where it is not yet."""
        return load(self.run.data, self.run.task, data_dir(self.run, self.directory.workdir))

    def batches(self, split: str = "validation", limit: int | None = None) -> Iterator[Batch]:
        """Batches of a split in order, at most `limit`; the last is padded with examples whose weights are 0.

        Raises: UserError for a split that the data does not have.
        """
        if split not in self.data.splits:
            raise UserError(f"the data of {self.directory.run_id} has no split {split!r}; it has {self.data.splits}")
        for number, batch in enumerate(self.data.eval_batches(split)):
            if limit is not None and number >= limit:
                return
            yield {name: jnp.asarray(leaf) for name, leaf in batch.items() if name != "index"}


def open_run(path: epath.PathLike) -> OpenedRun:
    """Opens a run whose training has finished.

    Raises: UserError where the directory is no run's, or has no good checkpoint of the last step.
    """
    directory = RunDirectory(path)
    config = directory.config
    run = configs.resolve(config)
    finished = restore_finished(directory.path, run)
    return OpenedRun(directory, config, run, run.training.steps, finished.state, finished.params)


def chosen_seeds(opened: OpenedRun, seed: int | None) -> tuple[int, ...]:
    """All the run's seeds, or the one asked for. Raises: UserError for one that it does not have."""
    if seed is not None:
        opened.trees(seed)
        return (seed,)
    return tuple(int(s) for s in np.asarray(opened.run.seeds))
