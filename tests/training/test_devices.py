"""How many CPU devices a run gets."""

import importlib.util
import os

import jax
import pytest

from mha_jax.training.devices import cpu_devices, devices_each, use_cores
from tests import tiny


@pytest.mark.parametrize(
    ("overrides", "cores", "devices"),
    [
        ({}, 1, 1),
        ({}, 2, 2),
        ({}, 3, 2),  # 8 examples
        ({}, 16, 8),
        ({"data__batch_size": 7}, 4, 1),
        ({"mesh__data": 4}, 2, 4),
        ({"mesh__seed": 2}, 5, 4),
        ({"mesh__seed": 2}, 1, 2),
    ],
)
def test_batches_are_split_over_the_most_cores_that_divide_them(overrides, cores, devices):
    assert cpu_devices(tiny.run("lm", **overrides), cores) == devices


def test_every_bucket_of_a_translation_run_is_split():
    run = tiny.run("translation", data__batch_tokens=24 * 13)
    assert cpu_devices(run, 3) == 2  # 24 and 40 rows


@pytest.mark.parametrize(
    ("overrides", "each"), [({}, 1), ({"mesh__head": 2}, 1), ({"mesh__head": 2, "mesh__data": 4}, 4)]
)
def test_each_of_two_processes_has_one_device_or_what_the_mesh_asks_for(overrides, each):
    assert devices_each(tiny.run("lm", **overrides), 2) == each


@pytest.mark.parametrize(
    ("given", "plugins", "flags"),
    [
        ("", (), "--xla_backend_optimization_level=2"),
        ("--xla_cpu_use_onednn=true", (), "--xla_cpu_use_onednn=true --xla_backend_optimization_level=2"),
        ("--xla_backend_optimization_level=1", (), "--xla_backend_optimization_level=1"),
        ("", ("jax_plugins",), ""),  # there may be a GPU
        ("", ("libtpu",), ""),
    ],
)
def test_programs_are_compiled_sooner_where_there_is_but_a_cpu(given, plugins, flags, monkeypatch):
    jax.devices()  # JAX has started: the number of its devices stays
    monkeypatch.setenv("XLA_FLAGS", given)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "here" if name in plugins else None)
    use_cores(tiny.run("lm"))
    assert os.environ["XLA_FLAGS"] == flags
