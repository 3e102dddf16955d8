"""What it means, in a user's words, when a file system will not take what is written to it."""

import errno
import os

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


def told(error: OSError) -> str | None:
    """The refusal with the path that it was met at and what to do, in one line."""
    why = refusal(error)
    where = f": {os.fsdecode(error.filename)}" if error.filename else ""
    return why and f"{why}{where}; mend that or give another place, and run again: what is saved is kept"
