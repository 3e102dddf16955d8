"""The seal of a checkpoint: a manifest with size and sha256 of every file, written last.

A directory counts as saved once its manifest is there and true. Writers can be killed at any moment, disks fill up and
files rot; whatever happens, the manifest then is missing or tells the difference.
"""

import hashlib
import json
from typing import Any

from etils import epath

FILE_NAME = "manifest.json"
_CHUNK_BYTES = 1 << 20


class Damaged(Exception):
    """A directory that is not, or no longer, what its manifest says. The message names the file."""


def seal(directory: epath.Path, facts: dict[str, Any]) -> None:
    """Writes the manifest of all files below the directory, with facts (JSON) about them, in one atomic step."""
    files = {name: [path.stat().length, _sha256(path)] for name, path in sorted(_files(directory).items())}
    body = {**facts, "files": files}
    partial = directory / (FILE_NAME + ".tmp")
    partial.write_text(json.dumps({**body, "digest": _digest(body)}))
    partial.replace(directory / FILE_NAME)


def read(directory: epath.Path) -> dict[str, Any]:
    """The manifest with its facts. Raises Damaged where there is none or it is not as written."""
    try:
        body = json.loads((directory / FILE_NAME).read_bytes())
        digest = body.pop("digest")
    except FileNotFoundError:
        raise Damaged(f"has no {FILE_NAME}: saving it was never finished") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise Damaged(f"is damaged: {FILE_NAME} cannot be read") from None
    if digest != _digest(body):
        raise Damaged(f"is damaged: {FILE_NAME} is not as written")
    return body


def verify(directory: epath.Path) -> dict[str, Any]:
    """The manifest, after every file that it names was read and found as written. Raises Damaged naming the file."""
    manifest = read(directory)
    for name, (size, sha256) in manifest["files"].items():
        path = directory / name
        try:
            found = path.stat().length
            true = found == size and _sha256(path) == sha256
        except FileNotFoundError:
            raise Damaged(f"is damaged: {name} is missing") from None
        if found != size:
            raise Damaged(f"is damaged: {name} has {found} bytes, {size} were written")
        if not true:
            raise Damaged(f"is damaged: {name} is not as written")
    return manifest


def unseal_and_remove(directory: epath.Path) -> None:
    """Removes the directory, manifest first, so that a removal cut short leaves nothing that looks saved."""
    (directory / FILE_NAME).unlink(missing_ok=True)
    directory.rmtree(missing_ok=True)


def _files(directory: epath.Path, prefix: str = "") -> dict[str, epath.Path]:
    found = {}
    for path in directory.iterdir():
        name = prefix + path.name
        if path.is_dir():
            found.update(_files(path, name + "/"))
        elif name not in (FILE_NAME, FILE_NAME + ".tmp"):
            found[name] = path
    return found


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
