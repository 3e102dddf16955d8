"""From an ml_collections config to a validated `RunSpec`, and a config's slug, hash and diff."""

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

from mha_jax.specs import (
    DataSpec,
    DecodingSpec,
    GatesSpec,
    MeshSpec,
    ModelSpec,
    OptimizerSpec,
    RunSpec,
    TrainingSpec,
    UserError,
)

_SECTIONS = {
    "mesh": MeshSpec,
    "model": ModelSpec,
    "data": DataSpec,
    "optimizer": OptimizerSpec,
    "training": TrainingSpec,
    "decoding": DecodingSpec,
    "gates": GatesSpec,
}
# Where a run's files lie and how it is spread over devices do not change its result.
_NOT_IN_HASH = ("data.data_dir", "parallel", "pack", "mesh.seed", "mesh.data", "mesh.head")
# Fields younger than runs that are kept: at their defaults they are not in the hash, so that those runs keep their ids.
_NEW_IN_MODEL = ("embedding_norm", "token_types", "pooling", "tied_output")
_LATER = {f"model.{name}": getattr(ModelSpec, name) for name in _NEW_IN_MODEL}

Spec = TypeVar("Spec")


def plain(value: Any) -> Any:
    """A config as JSON sees it: dicts, lists, numbers, strings, None."""
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    return value


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _frozen(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    return value


def unknown_field(name: str, known: list[str]) -> UserError:
    """The error for a config field that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
    return UserError(f"unknown config field {name!r}{hint}")


def _build(spec: type[Spec], section: Mapping[str, Any], prefix: str) -> Spec:
    fields = {f.name: f for f in dataclasses.fields(spec)}  # pyright: ignore[reportArgumentType]
    for name in section:
        if name not in fields:
            raise unknown_field(prefix + name, [prefix + f for f in fields])
    missing = [
        name
        for name, field in fields.items()
        if name not in section and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"config field {prefix + missing[0]!r} is missing")
    built = {
        name: _build(field.type, section[name], f"{prefix}{name}.")  # pyright: ignore[reportArgumentType]
        for name, field in fields.items()
        if dataclasses.is_dataclass(field.type) and isinstance(section.get(name), Mapping)
    }
    try:
        return spec(**{**_frozen(section), **built})
    except TypeError as error:  # such as text where a number is compared
        raise UserError(f"{prefix.rstrip('.') or 'config'} has a value of the wrong kind: {error}") from error


def resolve(config: ConfigDict | Mapping[str, Any]) -> RunSpec:
    """The validated spec of a config. Raises UserError with one line on the first thing that is wrong."""
    tree = plain(config)
    built = {
        name: _build(spec, tree[name], f"{name}.")
        for name, spec in _SECTIONS.items()
        if isinstance(tree.get(name), dict)
    }
    return _build(RunSpec, {**tree, **built}, "")


def flatten(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names to values: {"model.num_heads": 8, ...}."""

    def walk(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        flat = {}
        for key, value in tree.items():
            name = prefix + key
            flat.update(walk(value, name + ".") if isinstance(value, dict) and value else {name: value})
        return flat

    return walk(plain(config), "")


def override(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """A copy of the config with dotted fields set. Raises UserError for a field that does not exist."""
    copy = config.copy_and_resolve_references()
    known = list(flatten(config))
    for name, value in values.items():
        *path, leaf = name.split(".")
        section = copy
        for part in path:
            if not isinstance(section, ConfigDict) or part not in section:
                raise unknown_field(name, known)
            section = section[part]
        if not isinstance(section, ConfigDict) or leaf not in section:
            raise unknown_field(name, known)
        with section.unlocked(), section.ignore_type():
            section[leaf] = value
    return copy


def _deciding(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """The fields that decide a run's result: of a parent its name, which ends with the hash of its own config."""
    flat = {k: v for k, v in flatten(config).items() if k not in _NOT_IN_HASH and (k not in _LATER or v != _LATER[k])}
    parent = flat.get("training.start_from")
    return flat | ({"training.start_from": parent.rstrip("/").rsplit("/", 1)[-1]} if parent else {})


def config_hash(config: ConfigDict | Mapping[str, Any]) -> str:
    """Eight hexadecimal digits of a sha256 over every field that decides the result."""
    flat = _deciding(config)
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:8]


def slug(name: str, overrides: Mapping[str, Any]) -> str:
    """A readable name for a cell: "default-num_heads=4"."""
    parts = [name] + [f"{key.rsplit('.', 1)[-1]}={plain(value)}" for key, value in overrides.items()]
    return re.sub(r"[^A-Za-z0-9_.=-]+", "_", "-".join(parts)).strip("_")[:80]


def run_id(config: ConfigDict | Mapping[str, Any], overrides: Mapping[str, Any]) -> str:
    """`<slug>-<hash8>`: what the run's directory is called."""
    return f"{slug(plain(config)['name'], overrides)}-{config_hash(config)}"


def diff(old: ConfigDict | Mapping[str, Any], new: ConfigDict | Mapping[str, Any]) -> list[str]:
    """One "field: old -> new" for every field that decides the result and differs."""
    a, b = _deciding(old), _deciding(new)
    names = sorted(a.keys() | b.keys())
    return [f"{k}: {a.get(k, '(absent)')} -> {b.get(k, '(absent)')}" for k in names if a.get(k) != b.get(k)]
