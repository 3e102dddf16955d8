"""The trained state of a finished run, and a new run's start from it."""

import functools
import json
from typing import Any, NamedTuple

import jax
from etils import epath

from mha_jax import config as configs
from mha_jax.specs import ATTENTION_KINDS, RunSpec, UserError
from mha_jax.training.checkpoints import Checkpoints, Restored
from mha_jax.training.evaluation import average
from mha_jax.training.step import State, init_state


class Finished(NamedTuple):
    """The state of the last step; `params` are those of the run's table: averaged where its config says so."""

    state: State
    params: Any


def restore_finished(directory: epath.Path, run: RunSpec) -> Finished:
    """The state that a run's training has ended with, all its seeds.

    Raises: UserError where there is no good checkpoint of the last step.
    """
    checkpoints = Checkpoints(directory / "checkpoints", keep_last=run.training.keep_last)
    done, last = checkpoints.steps(), run.training.steps
    if last not in done:
        raise UserError(
            f"run {directory.name} has no finished checkpoint of step {last}"
            + (f" (the newest is of step {done[-1]})" if done else "")
            + ": train it to its end first"
        )
    abstract = jax.eval_shape(functools.partial(init_state, run))
    saved = [_restored(checkpoints, abstract, step) for step in done[-run.training.average_last :]]
    checkpoints.close()
    params = [one.state["params"] for one in saved]
    return Finished(saved[-1].state, params[0] if len(params) == 1 else average(params))


def parent_state(run: RunSpec) -> State:
    """Params and constants of the run that `training.start_from` names, for the child's seeds, in the child's order.

    Learned gates are not among them: those start anew. A head that the parent has closed stays closed. A parent of
    another task with the same attentions, as a masked language model is for a classifier, gives its tokens and stacks.
    An imported run gives its weights to every seed.

    Raises: UserError, before anything is compiled, where the directory is no finished run's, its name is not that of
    its config, it lacks a seed, has learned gates of its own, or has other shapes.
    """
    directory = epath.Path(str(run.training.start_from))
    file = directory / "config.json"
    if not file.exists():
        raise UserError(f"training.start_from={str(directory)!r} is no run directory: it has no config.json")
    config = json.loads(file.read_text())
    parent = configs.resolve(config)
    if not directory.name.endswith(configs.config_hash(config)):
        raise UserError(
            f"training.start_from={str(directory)!r} must keep the name that it was trained under, which ends with "
            f"{configs.config_hash(config)}"
        )
    imported = (parent.parent or {}).get("surgery") == "import"  # its one seed stands for nothing
    missing = [] if imported else [seed for seed in run.seeds if seed not in parent.seeds]
    if missing:
        raise UserError(f"training.start_from: {directory.name} has seeds {list(parent.seeds)}, and not {missing[0]}")
    if parent.gates.kind != "none":
        raise UserError(
            f"training.start_from: {directory.name} has learned gates (gates.kind={parent.gates.kind!r}); start from "
            "a run without, or prune it first"
        )
    _check_shapes(directory.name, parent, run)
    finished = restore_finished(directory, parent)
    chosen = [0 if imported else parent.seeds.index(seed) for seed in run.seeds]
    return jax.tree.map(
        lambda leaf: leaf[jax.numpy.asarray(chosen)],
        {"params": finished.params, "constants": finished.state["constants"]},
    )


def with_parent(state: State, parent: State) -> State:
    """The state at step 0 with the parent's params and constants wherever it has them."""
    return {**state, **{name: _merged(state[name], tree) for name, tree in parent.items()}}


def _merged(own: Any, parent: Any) -> Any:
    if not isinstance(own, dict):
        return parent
    return {name: _merged(leaf, parent[name]) if name in parent else leaf for name, leaf in own.items()}


def _check_shapes(name: str, parent: RunSpec, run: RunSpec) -> None:
    have, want = (_shapes(spec) for spec in (parent, run))
    if parent.task != run.task and ATTENTION_KINDS[parent.task] == ATTENTION_KINDS[run.task]:
        shared = ("tokens", *ATTENTION_KINDS[run.task])
        have, want = ({leaf: x for leaf, x in of.items() if leaf.split("/")[1] in shared} for of in (have, want))
    for leaf in sorted(have.keys() | want.keys()):
        if have.get(leaf) != want.get(leaf):
            raise UserError(
                f"training.start_from: {name} does not fit: {leaf} is {have.get(leaf, 'not there')}, wanted is "
                f"{want.get(leaf, 'none')}"
            )


def _shapes(run: RunSpec) -> dict[str, Any]:
    """Shape and dtype of every param and constant of one seed, learned gates left out."""
    state = jax.eval_shape(functools.partial(init_state, run))
    leaves = jax.tree.leaves_with_path({part: state[part] for part in ("params", "constants")})
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return {name: f"{leaf.dtype}{list(leaf.shape[1:])}" for name, leaf in named.items() if "learned_gate" not in name}


def _restored(checkpoints: Checkpoints, abstract: State, step: int) -> Restored:
    restored = checkpoints.restore(abstract, step=step)
    assert restored is not None  # a step that is asked for is restored or raises
    return restored
