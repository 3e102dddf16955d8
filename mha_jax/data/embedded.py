"""A corpus that every CPython brings along: the help topics and the docstrings of its standard library.

Nothing is downloaded and nothing is imported from the modules that are read. The text differs a little between Python
versions, so its sha256 belongs to every result.
"""

import ast
import hashlib
import inspect
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_SKIPPED = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _modules() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in _SKIPPED]
        found += [Path(directory, name) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def fingerprint() -> str:
    """A sha256 that changes when the standard library does, from names, sizes and times alone (milliseconds)."""
    facts = [sys.version]
    for path in _modules():
        stat = path.stat()
        facts.append(f"{path} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _docstrings(path: Path) -> str:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # a few library files are templates or deliberately broken
        return ""
    nodes = (node for node in ast.walk(tree) if isinstance(node, _WITH_DOCSTRING))
    found = [inspect.cleandoc(doc) for node in nodes if (doc := ast.get_docstring(node, clean=False))]
    return "\n\n".join(found)


def _documents() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]
    for path in _modules():
        yield _docstrings(path)


def documents() -> dict[str, list[str]]:
    """Distinct documents by split, about 90/5/5 by the hash of each: one is a help topic or a module's docstrings."""
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    texts = (text.encode(errors="ignore").decode().strip() for text in _documents())
    for text in dict.fromkeys(text for text in texts if text):
        lot = hashlib.sha256(text.encode()).digest()[0] % 20
        splits[{0: "validation", 1: "test"}.get(lot, "train")].append(text)
    return splits
