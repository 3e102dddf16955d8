"""One cache of compiled programs for all cells of a sweep, which gets rid of what is damaged in it."""

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

_DAMAGED = re.compile(r"Error reading persistent compilation cache entry for '([^']+)'")


@contextlib.contextmanager
def compile_cache(workdir: epath.Path) -> Iterator[None]:
    """Keeps compiled programs in WORKDIR/.cache/xla, or where JAX_COMPILATION_CACHE_DIR says.

    JAX compiles a program anew where its entry cannot be read, as after a kill while it was written, but leaves the
    entry as it is, to be met again by every run. Here the entries of that program's name are removed, and written anew.
    """
    folder = epath.Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or workdir / ".cache" / "xla")
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    show = warnings.showwarning

    def forget(message: Warning | str, *where: Any) -> None:
        if damaged := _DAMAGED.match(str(message)):
            for entry in folder.glob(f"{damaged[1]}-*"):
                entry.unlink(missing_ok=True)
            message = f"{message}; removed, it is compiled and kept anew"
        show(message, *where)

    warnings.showwarning = forget
    try:
        yield
    finally:
        warnings.showwarning = show
