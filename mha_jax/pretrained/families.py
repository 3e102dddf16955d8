"""Checkpoints of any family that is known: which one it is, its weights as our tree, and the way back."""

import dataclasses
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from etils import epath

from mha_jax.pretrained import bert, directory, gpt2, llama, sizes
from mha_jax.pretrained.directory import Tensors
from mha_jax.pretrained.layout import to_ours, to_theirs
from mha_jax.specs import RunSpec, UserError

FAMILIES = (bert, gpt2, llama)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory that was read: its config.json and tensors, and what they are to us.

    `tensors`: by the names of the family's `entries`. `model`: fields of `ModelSpec`. `params`: the tree of the task's
    model. `labels`: the names of a classifier's classes. `notes`: what is not as in the file, a line each.
    """

    family: ModuleType
    config: dict[str, Any]
    tensors: Tensors
    task: str
    vocab_size: int
    labels: tuple[str, ...] | None
    model: dict[str, Any]
    params: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def about(self) -> str:
        """What it is, in a line."""
        return f"{self.family.MODEL_TYPE} of {self.model['num_layers']} layers, d_model={self.model['d_model']}"

    def hidden_states(self, tokens_T: np.ndarray) -> list[np.ndarray]:
        """The float64 forward pass of the tensors: what each layer reads, the last one's output, logits."""
        return self.family.hidden_states(self.config, self.tensors, tokens_T)


def read(path: epath.PathLike) -> Checkpoint:
    """Reads a directory with config.json and safetensors files.

    Raises: UserError for a family that is not known, fields that our models cannot follow, tensors that do not fit.
    """
    config = directory.read_config(path)
    kind = config.get("model_type")
    family = next((one for one in FAMILIES if kind == one.MODEL_TYPE), None)
    if family is None:
        known = ", ".join(one.MODEL_TYPE for one in FAMILIES)
        raise UserError(f"{path}: model_type={kind!r} of config.json is not known; {known} are")
    task, model = family.task_of(config), family.fields(config)
    tensors, notes = family.prepared(config, directory.read_tensors(path))
    params = to_ours(family.entries(config), tensors, str(path))
    labels = family.labels(config) if task == "classification" else None
    vocabulary = sizes.number(config, "vocab_size")
    return Checkpoint(family, config, tensors, task, vocabulary, labels, model, params, tuple(notes))


def relabelled(checkpoint: Checkpoint, labels: Sequence[str]) -> Checkpoint:
    """A classifier whose classes come in the order of these names, as those of a data file do: sorted.

    Names count as the same whatever their case, and "3" as "LABEL_3". Where they are other names, classes stay as they
    are, and a note says which name is taken for which.
    """
    names, theirs = (list(map(_plain, of)) for of in (labels, checkpoint.labels or ()))
    if sorted(names) != sorted(theirs):
        pairs = ", ".join(f"{name!r} for {own!r}" for name, own in zip(labels, checkpoint.labels or (), strict=False))
        note = f"the labels of the data are not those of config.json; they are taken in their order: {pairs}"
        return dataclasses.replace(checkpoint, notes=(*checkpoint.notes, note))
    tensors = checkpoint.family.relabelled(checkpoint.tensors, [theirs.index(name) for name in names])
    params = to_ours(checkpoint.family.entries(checkpoint.config), tensors, "classes")
    return dataclasses.replace(checkpoint, tensors=tensors, params=params, labels=tuple(labels))


def _plain(label: str) -> str:
    return label.casefold().removeprefix("label_")


def written(run: RunSpec, params: Any, labels: Sequence[str] | None = None) -> tuple[dict[str, Any], Tensors]:
    """config.json and tensors of a run's model in the family that can say all of it, with a head map where it must.

    `labels`: the names of a classifier's classes.

    Raises: UserError for a model that is of none of the families, with what stands against the nearest.
    """
    if run.task == "translation":
        raise UserError("a model of task='translation' is of no family that can be exported: bert, gpt2, llama")
    found = {}
    for family in FAMILIES:
        config = family.config_of(run, sizes.sizes_of(run))
        against = _against(run, family, config)
        if not against:
            return config | (family.label_fields(labels) if labels else {}), to_theirs(family.entries(config), params)
        found[family.MODEL_TYPE] = against
    nearest = min(found, key=lambda name: len(found[name]))
    raise UserError(f"the model is no bert, gpt2 or llama; against {nearest} stands {', '.join(found[nearest])}")


def _against(run: RunSpec, family: ModuleType, config: dict[str, Any]) -> list[str]:
    """The fields in which the model that such a config.json makes is not the run's."""
    task = family.task_of(config)
    against = [f"task={run.task!r}"] if task != run.task else []
    if run.model.routing.kind != "none":
        against.append(f"model.routing.kind={run.model.routing.kind!r}")
    if run.model.adaptive_span.max_span is not None:
        against.append(f"model.adaptive_span.max_span={run.model.adaptive_span.max_span}")
    try:
        fields = family.fields(config)
    except UserError as error:
        return [*against, str(error)]
    heads = ("num_heads", "num_kv_heads", "qk_dim", "v_dim", "head_to_group", "d_ff")  # these come from the run
    return against + [
        f"model.{name}={getattr(run.model, name)!r}"
        for name, value in fields.items()
        if name not in heads and getattr(run.model, name) != value
    ]
