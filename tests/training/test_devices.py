"""How many CPU devices a run gets."""

import pytest

from mha_jax.training.devices import cpu_devices, devices_each
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
