"""What it means, in a user's words, when a file system will not take what is written to it."""

import errno
import os
from pathlib import Path

_WORDS = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk quota used up",
    errno.EROFS: "read-only file system",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOTDIR: "a file lies where a directory is wanted",
}
# Storage libraries raise errors of their own, which quote the system's text.
_QUOTED = {os.strerror(number): _WORDS[number] for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)}
# What etils needs beside itself for a bucket, by the library whose lack is told.
_BUCKETS = {"gcsfs": ("gs://", "epath-gcs"), "s3fs": ("s3://", "epath-s3")}


def refusal(error: BaseException) -> str | None:
    """Why the file system refused ("disk full"), found in the error or its causes; None for an error of another kind.

    A refusal is the user's to mend: the same call would fail again.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _WORDS:
            return _WORDS[cause.errno]
        for text, words in _QUOTED.items():
            if text in str(cause):
                return words
        cause = cause.__cause__ or cause.__context__
    return None


def told(error: OSError | ImportError) -> str | None:
    """The refusal with the path that it was met at and what to do, in one line; also a bucket without its library."""
    if isinstance(error, ImportError):
        lacking = (names for library, names in _BUCKETS.items() if library in str(error))
        return next((f"{place} needs: python -m pip install 'etils[{extra}]'" for place, extra in lacking), None)
    why = refusal(error)
    where = f": {os.fsdecode(error.filename)}" if error.filename else ""
    if isinstance(error, FileNotFoundError) and (link := _dangling(error)):
        why, where = "a link that leads nowhere", f": {link}"
    return why and f"{why}{where}; mend that or give another place, and run again: what is saved is kept"


def _dangling(error: OSError) -> Path | None:
    """The link without a target that a path leads through, if there is one."""
    path = Path(os.fsdecode(error.filename or ""))
    return next((part for part in (path, *path.parents) if part.is_symlink() and not part.exists()), None)
