import json

import pytest

from mha_jax.specs import MeshSpec, UserError
from mha_jax.sweeps import hardware
from mha_jax.sweeps.plan import Expectation, Memory, expectation

MINE = {
    "kinds": ["Toy 1"],
    "peak_tflops": {"float32": 2, "bfloat16": 4},
    "memory_gib": 1,
    "memory_gb_per_second": 10,
    "source": "made up",
}


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


def record(path, device, *, step_flops, milliseconds, processor="P", devices=1, benchmark="train_step", **said):
    rows = [{"step_flops": step_flops, "step_ms": {"mha_jax": {"median": ms}}} for ms in milliseconds]
    machine = {"processor": processor, "cores": 4, "device": device, "devices": devices}
    write(path, {"benchmark": benchmark, "environment": machine, "setting": {"devices": None}, "rows": rows, **said})


def test_every_device_of_the_table_is_found_by_name_and_by_kind():
    table = hardware.table()
    for name, device in table.items():
        assert hardware.find(table, name.upper()) is device
        assert all(hardware.find(table, kind) is device for kind in device.kinds)
        assert device.peak_flops["bfloat16"] >= device.peak_flops["float32"] >= 1e12
    kinds = [kind for device in table.values() for kind in device.kinds]
    assert len(kinds) == len(set(kinds))
    assert table["v5e"].peak_flops["bfloat16"] == 197e12
    assert hardware.find(table, "v9") is None


def test_a_file_adds_a_device_and_replaces_one(tmp_path):
    file = write(tmp_path / "mine.json", {"toy": MINE, "v5e": MINE | {"kinds": ["TPU v5 lite"]}})
    table = hardware.table(file)
    assert table["toy"].peak_flops == {"float32": 2e12, "bfloat16": 4e12}
    assert (table["toy"].memory_bytes, table["toy"].bytes_per_second) == (2**30, 1e10)
    assert hardware.find(table, "TPU v5 lite").source == "made up"
    assert "v4" in table


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is not JSON"),
        ([1], "must be one object"),
        ({"toy": {**MINE, "hbm": 1}}, "has 'hbm'; its fields are 'kinds'"),
        ({"toy": {k: v for k, v in MINE.items() if k != "source"}}, "lacks 'source'"),
        ({"toy": MINE | {"kinds": "Toy 1"}}, "kinds='Toy 1' must be a list"),
        ({"toy": MINE | {"peak_tflops": {"bfloat16": 1}}}, "at least for float32"),
        ({"toy": MINE | {"peak_tflops": {"float32": -1}}}, "peak_tflops.float32=-1 must be a number above 0"),
        ({"toy": MINE | {"memory_gib": float("inf")}}, "memory_gib=inf must be a number above 0"),
        (
            {"toy": MINE | {"peak_tflops": {"float32": float("nan")}}},
            "peak_tflops.float32=nan must be a number above 0",
        ),
        ({"toy": MINE | {"peak_tflops": {"float32": 1, "bfloat61": 1}}}, "'bfloat61', which is no dtype; 'float32'"),
        ({"toy": MINE | {"memory_gib": "16"}}, "memory_gib='16' must be a number above 0"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(tmp_path, content, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        hardware.table(write(tmp_path / "mine.json", content))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none.json cannot be read"):
        hardware.table(str(tmp_path / "none.json"))


def test_without_a_record_a_part_of_the_peak_is_assumed(tmp_path):
    device = hardware.table()["v5e"]
    record(tmp_path / "other.json", "TPU v4", step_flops=1e12, milliseconds=[10])
    record(tmp_path / "bench.json", "TPU v5 lite", step_flops=1e12, milliseconds=[10], benchmark="decode")
    speed = hardware.speed(device, tmp_path)
    assert speed.flops_per_second["bfloat16"] == hardware.ASSUMED * 197e12
    assert "an assumption" in speed.basis and "Cloud TPU documentation" in speed.basis


def test_a_record_of_the_device_tells_what_part_of_the_peak_is_reached(tmp_path):
    device = hardware.table()["a100-40gb"]
    # 156 TFLOP in 1, 2 and 4 seconds on two devices: the median is a quarter of the peak of 156 each
    record(tmp_path / "a.json", device.kinds[0], step_flops=156e12, milliseconds=[1e3, 2e3, 4e3], devices=2)
    speed = hardware.speed(device, tmp_path)
    assert speed.flops_per_second == pytest.approx({"bfloat16": 78e12, "float32": 39e12, "float64": 19.5e12 / 4})
    assert "a.json" in speed.basis and "25%" in speed.basis


@pytest.mark.parametrize("content", ["{", {"benchmark": "train_step", "rows": []}])
def test_a_record_that_cannot_be_read_is_told_in_one_line(tmp_path, content):
    write(tmp_path / "a.json", content)
    with pytest.raises(UserError, match=r"a\.json is no record of a benchmark: "):
        hardware.speed(hardware.table()["v4"], tmp_path)


def test_a_record_in_another_type_is_a_part_of_that_types_peak(tmp_path):
    device = hardware.table()["a100-40gb"]
    record(tmp_path / "a.json", device.kinds[0], step_flops=156e12, milliseconds=[1e3], dtype="bfloat16")
    assert hardware.speed(device, tmp_path).flops_per_second["float32"] == pytest.approx(78e12)


def test_a_record_of_a_cpu_is_of_its_cores_and_counts_on_that_processor_only(tmp_path):
    core = hardware.Device("P", ("cpu",), {"float32": 9e9, "float64": 4.5e9}, None, None, "timed")
    record(tmp_path / "a.json", "cpu", step_flops=4e9, milliseconds=[500], processor="another")
    assert "an assumption" in hardware.speed(core, tmp_path).basis
    record(tmp_path / "b.json", "cpu", step_flops=4e9, milliseconds=[500])
    # 8 GFLOP/s on four cores
    assert hardware.speed(core, tmp_path).flops_per_second == pytest.approx({"float32": 2e9, "float64": 1e9})


def test_the_records_of_this_repository_are_understood():
    files = [json.loads(path.read_text()) for path in hardware.RECORDS.glob("*.json")]
    of_steps = [file for file in files if file.get("benchmark") == "train_step"]
    (of_cpu,) = [file for file in of_steps if file["environment"]["device"] == "cpu"]
    core = hardware.Device(of_cpu["environment"]["processor"], ("cpu",), {"float32": 1e11}, None, None, "timed")
    # A core computes between a billion and a trillion operations a second.
    assert 1e9 < hardware.speed(core).flops_per_second["float32"] < 1e12


def test_this_cpu_is_timed():
    core = hardware.this_cpu()
    assert 1e8 < core.peak_flops["float32"] < 1e13
    assert core.peak_flops["float64"] == core.peak_flops["float32"] / 2


TOY = Expectation("toy", ("Toy 1",), 4, {"float32": 1e12}, 1e9, "because")


def test_a_step_takes_the_longer_of_computing_and_moving():
    assert TOY.step_seconds(8e12, 1e9, "float32") == 2.0
    assert TOY.step_seconds(8e12, 3e9, "float32") == 3.0
    assert TOY.step_seconds(8e12, 1e9, "float64") is None
    assert TOY.device_hours(2.0, 900) == 2.0  # half an hour on four devices


def test_an_expectation_survives_sweep_json():
    assert Expectation.from_facts(json.loads(json.dumps(TOY.facts()))) == TOY


def test_a_cell_has_the_devices_of_its_mesh_or_the_cores_of_its_worker():
    device, speed = hardware.table()["v4"], hardware.Speed({"float32": 1.0}, "x")
    assert expectation(device, speed, MeshSpec(data=2), count=8).devices == 2
    assert expectation(device, speed, MeshSpec(head=2), count=8).devices == 8
    assert expectation(device, speed, MeshSpec(), count=1, cores=3).devices == 3
    assert str(expectation(device, speed, MeshSpec(), count=8)) == "8 × v4"


@pytest.mark.parametrize(
    ("memory", "text"),
    [
        (Memory(3 * 2**20, None, True), "~3 MiB"),
        (Memory(3 * 2**20, 2**30, True), "~3 MiB"),
        (Memory(3 * 2**30, 2**31, True), "~3.0 GiB of 2.0 GiB: 1.0 GiB too much"),
        (Memory(3 * 2**29, 2**31, False), "1.5 GiB of 2.0 GiB"),
        (Memory(None, 2**31, False), "unknown"),
    ],
)
def test_memory_says_whether_it_fits_and_by_how_much_it_does_not(memory, text):
    assert str(memory) == text
