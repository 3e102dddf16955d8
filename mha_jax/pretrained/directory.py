"""Checkpoint directories as the Hugging Face libraries write them: config.json beside one or more safetensors files."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from mha_jax.specs import UserError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
Tensors = dict[str, np.ndarray]


def read_config(directory: epath.PathLike) -> dict[str, Any]:
    """The config.json of a checkpoint. Raises: UserError where it is missing or no JSON object."""
    return _read_json(epath.Path(directory) / CONFIG)


def read_tensors(directory: epath.PathLike) -> Tensors:
    """All tensors of a checkpoint by their names; those of 16 bits as float32, which holds them exactly.

    Raises: UserError for files that are missing or damaged, a tensor that is in two shards or not where the index says,
        and numbers that are not finite.
    """
    folder = epath.Path(directory)
    if not (folder / INDEX).exists():
        return _read_file(folder / WEIGHTS)
    places = _read_json(folder / INDEX).get("weight_map", {})
    tensors: Tensors = {}
    for shard in sorted(set(places.values())):
        found = _read_file(folder / shard)
        listed = {name for name, place in places.items() if place == shard}
        if listed != found.keys():
            raise UserError(
                f"{folder / shard} does not hold what {INDEX} says: {', '.join(sorted(listed ^ found.keys())[:8])}"
            )
        tensors |= found
    return tensors


def write(directory: epath.PathLike, config: Mapping[str, Any], tensors: Tensors) -> None:
    """Writes config.json and model.safetensors into a new directory. Raises: UserError where it has any of them."""
    from safetensors.numpy import save

    folder = epath.Path(directory)
    for name in (CONFIG, WEIGHTS):
        if (folder / name).exists():
            raise UserError(f"{folder / name} is there already; remove it, or name another directory")
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    (folder / WEIGHTS).write_bytes(save(whole, {"format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _read_json(file: epath.Path) -> dict[str, Any]:
    if not file.exists():
        raise UserError(f"{file} does not exist; a checkpoint is a directory with {CONFIG} and {WEIGHTS}")
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no JSON object")
    return found


def _read_file(file: epath.Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not file.exists():
        raise UserError(f"{file} does not exist; only safetensors files are read, since others can run code")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is no whole safetensors file: {str(error).splitlines()[0]}") from None
    return {name: _checked(file, name, tensor) for name, tensor in tensors.items()}


def _checked(file: epath.Path, name: str, tensor: np.ndarray) -> np.ndarray:
    if tensor.dtype.itemsize == 2:
        tensor = tensor.astype(np.float32)
    if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
        raise UserError(f"{file} is damaged: {name} holds numbers that are not finite")
    return tensor
