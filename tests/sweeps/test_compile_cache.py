"""The sweep's compile cache: where it lies, and that a damaged entry is met once."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from mha_jax.sweeps.compile_cache import compile_cache

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compile_as_a_new_process(folder):
    """What a process warns of that compiles one program and ends."""
    jax.clear_caches()

    def of_this_test(x):
        return x * 3

    with warnings.catch_warnings(record=True) as given, compile_cache(epath.Path(folder)):
        warnings.simplefilter("always")
        assert jax.jit(of_this_test)(jnp.float32(2)) == 6
    return [str(warning.message) for warning in given if "of_this_test" in str(warning.message)]


def test_a_damaged_entry_is_told_of_once_and_written_anew(tmp_path):
    assert compile_as_a_new_process(tmp_path) == []
    (entry,) = (tmp_path / ".cache" / "xla").glob("jit_of_this_test-*-cache")
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2])
    (told,) = compile_as_a_new_process(tmp_path)
    assert told.endswith("; removed, it is compiled and kept anew")
    assert entry.exists()
    assert compile_as_a_new_process(tmp_path) == []


def cache_dir():
    return jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]


def test_the_cache_lies_with_the_sweep_or_where_the_user_says(tmp_path, monkeypatch):
    with compile_cache(epath.Path(tmp_path)):
        assert cache_dir() == str(tmp_path / ".cache" / "xla")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))  # as JAX reads it when it is imported
    with compile_cache(epath.Path(tmp_path)):
        assert cache_dir() == str(tmp_path / "mine")
