"""The platform that programs are made for: that of this machine's devices, or one that is only planned for."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


def target() -> str:
    """ "cpu", "gpu" or "tpu"; code that chooses by platform asks here."""
    return _target.get() or jax.default_backend()


@contextlib.contextmanager
def made_for(platform: str) -> Iterator[None]:
    """What is traced inside is to be compiled for this platform, whether or not it is here."""
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)
