"""Runs a script's main in this process as the shell would see it: exit code and standard error."""

import dataclasses
import sys

import jax
import pytest

from experiments import cli

_CACHE_SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@dataclasses.dataclass
class Ended:
    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line that a user's mistake is answered with."""
        lines = self.err.strip().splitlines()
        assert self.code == 2, self.err
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        return lines[0]


@pytest.fixture
def script(monkeypatch, capsys):
    settings = {name: getattr(jax.config, name) for name in _CACHE_SETTINGS}

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.run(main)
        out, err = capsys.readouterr()
        return Ended(int(ended.value.code or 0), out, err)

    yield call
    for name, value in settings.items():
        jax.config.update(name, value)
