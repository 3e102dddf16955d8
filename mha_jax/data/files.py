"""Text files that the user names, plain or .gz: documents of one language, lines of two that match, or labelled lines.

`data.files` maps "train", "validation" and "test" to a path (or several) for text, plain or labelled, and to (source,
target) for parallel text. Paths go through epath, so gs:// works; a relative one starts at the working directory.
"""

import gzip
import hashlib
import re
import zlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from mha_jax.specs import UserError

SPLITS = ("train", "validation", "test")


def named(files: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The paths of each split that has any. Raises UserError for a split that is none."""
    for split in files:
        if split not in SPLITS:
            raise UserError(f"data.files names the split {split!r}; known are 'train', 'validation' and 'test'")
    paths = {split: files[split] for split in SPLITS if files.get(split)}
    return {split: (value,) if isinstance(value, str) else tuple(value) for split, value in paths.items()}


def _read_bytes(path: str) -> bytes:
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"data file {path} does not exist")
    if file.is_dir():
        raise UserError(f"data file {path} is a directory; name the file in it")
    return file.read_bytes()


def digests(files: Mapping[str, Any]) -> dict[str, str]:
    """sha256 of every file as it lies on disk, by path."""
    return {path: hashlib.sha256(_read_bytes(path)).hexdigest() for paths in named(files).values() for path in paths}


def _read_text(path: str) -> str:
    raw = _read_bytes(path)
    if path.endswith(".gz"):
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"data file {path} is not a whole gzip file: {error}") from None
    try:
        text = raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"data file {path} is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}") from None
    if not text.strip():
        raise UserError(f"data file {path} is empty")
    return text.replace("\r\n", "\n")


def documents(files: Mapping[str, Any]) -> dict[str, list[str]]:
    """The documents of each split in the order of the files: parted by blank lines, or one a line without any."""
    return {
        split: [document for path in paths for document in _documents(_read_text(path))]
        for split, paths in named(files).items()
    }


def _documents(text: str) -> list[str]:
    parts = re.split(r"\n(?:[^\S\n]*\n)+", text.strip())
    if len(parts) == 1:
        parts = text.split("\n")
    return [part.strip("\n") for part in parts if part.strip()]


def _lines(path: str) -> list[str]:
    # Not splitlines(): it also splits at U+2028 and form feeds, which one language may have and the other not.
    return _read_text(path).removesuffix("\n").split("\n")


def pairs(files: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Line n of the source with line n of the target, by split. Raises UserError where the counts differ."""
    found = {}
    for split, paths in named(files).items():
        if len(paths) != 2:
            raise UserError(f"data.files.{split}={paths!r} must be two files: (source, target)")
        source, target = map(_lines, paths)
        if len(source) != len(target):
            raise UserError(
                f"data.files.{split}: {paths[0]} has {len(source)} lines and {paths[1]} has {len(target)}; "
                "parallel files must have as many lines"
            )
        found[split] = list(zip(source, target, strict=True))
    return found


def labelled(files: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, list[tuple[str, str]]]]:
    """The names of the labels in training, sorted, and (label, text) of every line by split.

    A line is a label, one tab, and a text. Raises: UserError, with file and line, where it is not, and for a label that
    training has not.
    """
    found = {
        split: [_labelled(path, number, line) for path in paths for number, line in enumerate(_lines(path), 1)]
        for split, paths in named(files).items()
    }
    known = tuple(sorted({label for label, _ in found["train"]}))
    for split, lines in found.items():
        for label, _ in lines:
            if label not in known:
                raise UserError(f"data.files.{split} has the label {label!r}; training has {', '.join(known)}")
    return known, found


def _labelled(path: str, number: int, line: str) -> tuple[str, str]:
    label, *texts = [part.strip() for part in line.split("\t")]
    if len(texts) != 1 or not label or not texts[0]:
        raise UserError(f"data file {path}, line {number}: {line[:60]!r} is not a label, a tab and a text without tabs")
    return label, texts[0]
