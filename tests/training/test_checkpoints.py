import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mha_jax.specs import UserError
from mha_jax.training import manifests
from mha_jax.training.checkpoints import Checkpoints


def make_state(step=0):
    """Two seeds of a small model: every dtype that we train in, a scalar a seed, a layer without heads."""
    random = np.random.default_rng(step)
    return {
        "params": {
            "query": {"kernel": jnp.asarray(random.normal(size=(2, 11, 3, 5)), jnp.float32)},
            "out": {"kernel": jnp.asarray(random.normal(size=(2, 3, 7, 11)), jnp.bfloat16)},
            "empty": {"kernel": jnp.zeros((2, 11, 0, 5))},
        },
        "optimizer": (jnp.full((2,), step, jnp.int32), [jnp.asarray([[0.1, -jnp.inf], [jnp.nan, 2.0]])]),
    }


def bits(tree):
    return [(np.asarray(x).dtype.name, np.asarray(x).shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def save_steps(directory, steps, keep_last=10, metrics=None):
    checkpoints = Checkpoints(directory, keep_last)
    for step in steps:
        checkpoints.save(step, make_state(step), {"at": step}, metric=(metrics or {}).get(step))
    checkpoints.wait()
    return checkpoints


def payload(directory, step):
    """The largest file of a step: array data."""
    files = [path for path in (directory / str(step)).rglob("*") if path.is_file()]
    return max((path for path in files if path.name != manifests.FILE_NAME), key=lambda path: path.stat().st_size)


def test_round_trip_is_bit_identical(tmp_path):
    save_steps(tmp_path, [5])
    restored = Checkpoints(tmp_path, 2).restore(jax.eval_shape(make_state))
    assert restored is not None and (restored.step, restored.metadata) == (5, {"at": 5})
    assert jax.tree.structure(restored.state) == jax.tree.structure(make_state(5))
    assert bits(restored.state) == bits(make_state(5))


def test_nothing_saved_restores_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path / "absent", 2)
    assert checkpoints.restore(make_state()) is None
    assert (checkpoints.steps(), checkpoints.problems) == ([], [])


def test_state_may_be_donated_right_after_save(tmp_path):
    state = jax.tree.map(jnp.copy, make_state(3))
    expected = bits(state)
    checkpoints = Checkpoints(tmp_path, 2)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    checkpoints.save(3, state, {})
    for _ in range(5):
        state = overwrite(state)
    restored = checkpoints.restore(make_state())
    assert restored is not None and bits(restored.state) == expected


@pytest.mark.parametrize(
    ("mode", "metrics", "kept"),
    [
        ("min", {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: 2.2}, [2, 4, 5]),
        ("max", {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: 2.2}, [1, 4, 5]),
        ("min", {1: None, 2: float("nan"), 3: 2.0, 4: 2.0, 5: None}, [3, 4, 5]),
        ("min", {}, [4, 5]),
    ],
)
def test_the_last_two_and_the_best_are_kept(tmp_path, mode, metrics, kept):
    checkpoints = Checkpoints(tmp_path, 2, metric_mode=mode)
    for step in range(1, 6):
        checkpoints.save(step, {"x": jnp.ones((2, 3))}, {}, metric=metrics.get(step))
    checkpoints.wait()
    assert checkpoints.steps() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(step) for step in kept]


def flip_byte(directory):
    data = bytearray(payload(directory, 2).read_bytes())
    data[len(data) // 2] ^= 1
    payload(directory, 2).write_bytes(data)


def truncate(directory):
    os.truncate(payload(directory, 2), payload(directory, 2).stat().st_size // 2)


def delete_file(directory):
    payload(directory, 2).unlink()


def delete_manifest(directory):
    (directory / "2" / manifests.FILE_NAME).unlink()


def truncate_manifest(directory):
    os.truncate(directory / "2" / manifests.FILE_NAME, 100)


def change_manifest(directory):
    path = directory / "2" / manifests.FILE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "metadata": {"at": 7}}))


def empty_manifest(directory):
    (directory / "2" / manifests.FILE_NAME).write_text("[]")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_byte, "is not as written"),
        (truncate, "bytes, .* were written"),
        (delete_file, "is missing"),
        (delete_manifest, "never finished"),
        (truncate_manifest, "cannot be read"),
        (change_manifest, "is not as written"),
        (empty_manifest, "cannot be read"),
    ],
)
def test_a_damaged_step_is_named_and_the_one_before_is_used(tmp_path, damage, reason):
    save_steps(tmp_path, [1, 2])
    damage(tmp_path)
    checkpoints = Checkpoints(tmp_path, 2)
    restored = checkpoints.restore(make_state())
    assert restored is not None and restored.step == 1 and bits(restored.state) == bits(make_state(1))
    assert len(checkpoints.problems) == 1 and checkpoints.problems[0].startswith("checkpoint step 2 ")
    assert checkpoints.steps() == [1]
    with pytest.raises(UserError, match=f"step 2 .*{reason}.*; good steps are \\[1\\]"):
        checkpoints.restore(make_state(), step=2)


def test_a_damaged_step_can_be_saved_again(tmp_path):
    save_steps(tmp_path, [1, 2])
    flip_byte(tmp_path)
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.restore(make_state())
    checkpoints.save(2, make_state(2), {})
    restored = checkpoints.restore(make_state())
    assert restored is not None and restored.step == 2 and checkpoints.problems == []
    assert checkpoints.steps() == [1, 2]


def test_a_temporary_directory_is_named_and_removed_by_the_next_save(tmp_path):
    save_steps(tmp_path, [1])
    leftover = tmp_path / "2.orbax-checkpoint-tmp-17"
    leftover.mkdir()
    checkpoints = Checkpoints(tmp_path, 2)
    restored = checkpoints.restore(make_state())
    assert restored is not None and restored.step == 1
    assert checkpoints.problems == ["checkpoint 2.orbax-checkpoint-tmp-17 was never finished"]
    checkpoints.save(3, make_state(3), {})
    checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


def test_a_step_does_not_count_before_it_is_sealed(tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "seal", lambda directory, facts: None)
    assert save_steps(tmp_path, [1]).steps() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["params"]["query"].update(kernel=jnp.zeros((2, 11, 3, 5), jnp.bfloat16)), "float32.* bfloat16"),
        (lambda s: s["params"]["query"].update(kernel=jnp.zeros((2, 11, 5, 3))), r"\[2, 11, 3, 5\].*\[2, 11, 5, 3\]"),
        (lambda s: s["params"]["empty"].update(kernel=jnp.zeros((2, 11, 0, 7))), r"\[2, 11, 0, 5\].*\[2, 11, 0, 7\]"),
        (lambda s: s["params"].update(new=jnp.zeros(3)), "params/new is saved as no such array"),
        (lambda s: s["params"].pop("out"), "params/out/kernel .* wanted is no such array"),
    ],
)
def test_other_dtypes_shapes_and_names_are_refused(tmp_path, change, message):
    checkpoints = save_steps(tmp_path, [1])
    wanted = make_state()
    change(wanted)
    with pytest.raises(UserError, match=f"checkpoint step 1 does not fit the run: .*{message}"):
        checkpoints.restore(wanted)


def test_other_device_counts_restore_the_same_values(tmp_path):
    mesh = jax.make_mesh((2, 4), ("seed", "data"), axis_types=(AxisType.Auto,) * 2)
    spread = NamedSharding(mesh, PartitionSpec("seed", "data"))
    x = jax.device_put(jnp.arange(2.0 * 8 * 3).reshape(2, 8, 3), spread)
    checkpoints = Checkpoints(tmp_path, 5)
    checkpoints.save(1, {"x": x}, {})
    one = checkpoints.restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype)})
    assert one is not None and len(one.state["x"].devices()) == 1
    checkpoints.save(2, one.state, {})
    eight = checkpoints.restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread)}, step=2)
    assert eight is not None and eight.state["x"].sharding == spread
    assert bits(x) == bits(one.state) == bits(eight.state)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError(
            "RESOURCE_EXHAUSTED: Failed to write 984380 bytes to file 4: No space left on device [os_error_code='28']"
        ),
    ],
)
def test_a_full_disk_names_the_last_good_step(tmp_path, monkeypatch, error):
    checkpoints = save_steps(tmp_path, [3])

    def full(directory, facts):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(manifests, "seal", full)
        checkpoints.save(4, make_state(4), {})
        with pytest.raises(UserError, match=r"^disk full while saving step 4; step 3 is the last good one$"):
            checkpoints.wait()
    restored = checkpoints.restore(make_state())
    assert restored is not None and restored.step == 3
    checkpoints.save(4, make_state(4), {})
    checkpoints.wait()
    assert checkpoints.steps() == [3, 4]


def test_any_other_failure_is_raised_as_it_is_by_the_next_call(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, 2)
    monkeypatch.setattr(manifests, "seal", lambda directory, facts: 1 / 0)
    checkpoints.save(1, {"x": jnp.ones(3)}, {})
    with pytest.raises(ZeroDivisionError):
        checkpoints.save(2, {"x": jnp.ones(3)}, {})
    checkpoints.wait()


def test_a_removal_cut_short_leaves_nothing_that_counts(tmp_path, monkeypatch):
    checkpoints = save_steps(tmp_path, [1, 2])
    monkeypatch.setattr(type(checkpoints.directory), "rmtree", lambda self, **_: None)
    manifests.unseal_and_remove(checkpoints.directory / "2")
    assert checkpoints.steps() == [1]


def test_importing_checkpoints_does_not_import_orbax():
    code = "import sys, mha_jax.training.checkpoints; assert 'orbax.checkpoint' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_a_good_step(tmp_path):
    program = """
        import sys, jax.numpy as jnp
        from mha_jax.training.checkpoints import Checkpoints
        checkpoints = Checkpoints(sys.argv[1], 2)
        restored = checkpoints.restore({"x": jnp.zeros((2, 300_000))})
        step = restored.step if restored else 0
        print("from", step, flush=True)
        while True:
            step += 1
            checkpoints.save(step, {"x": jnp.full((2, 300_000), step, jnp.float32)}, {}, metric=1.0 / step)
    """
    for delay in (0.05, 0.11, 0.23, 0.37):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline().startswith("from")
        deadline = time.monotonic() + 60
        while len(Checkpoints(tmp_path, 2).steps()) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        newest = Checkpoints(tmp_path, 2).steps()[-1]
        restored = Checkpoints(tmp_path, 2).restore({"x": jnp.zeros((2, 300_000))})
        assert restored is not None and restored.step == newest
        assert np.all(np.asarray(restored.state["x"]) == restored.step)
