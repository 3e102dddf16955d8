"""A tiny config file to make studies of, and cells whose training is a play: it sleeps, counts and fails on demand."""

import sys
import textwrap

import pytest

CONFIG = """
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(profile=""):
    if profile not in ("", "wide"):
        raise KeyError(profile)
    config = ConfigDict()
    config.update(name="tiny", task="lm", seeds=(0, 1), parallel="jit", pack="auto")
    config.mesh = {"seed": 1, "data": placeholder(int), "head": 1}
    config.model = dict(num_layers=1, d_model=22 if profile == "wide" else 12, num_heads=2, d_ff=13, max_length=8)
    config.model.update(match="none", match_base=placeholder(dict), num_kv_heads=placeholder(int))
    config.model.update(qk_dim=placeholder(int), v_dim=placeholder(int), dropout_rate=0.0)
    config.data = dict(source="embedded", length=7, batch_size=5, data_dir=placeholder(str))
    config.optimizer = {"learning_rate": 1e-3, "weight_decay": 0.0, "warmup_steps": 3}
    config.training = dict(steps=11, eval_every=5, checkpoint_every=4)
    config.decoding = ConfigDict()
    return config.lock()


def get_sweep(profile=""):
    for num_heads in (1, 2, 3, 5):
        yield {"model.num_heads": num_heads}


PAPER = {"rows": [{"label": "base", "cell": {}}]}
CLAIMS = [{"text": "2 beat 1", "metric": "validation/loss", "better": {}, "worse": {"model.num_heads": 1}}]
"""

# Stands in for `python -m mha_jax.sweeps.cell`: the real cell around a play of a training loop. What it plays is the
# config's name. Each training is told to `trace.txt` in the sweep's directory.
CELL = """
import os, pathlib, sys, time, types

sys.path.insert(0, os.getcwd())
play = types.ModuleType("mha_jax.training.loop")
package = types.ModuleType("mha_jax.training")
package.loop = play
package.__path__ = [os.path.abspath("mha_jax/training")]
devices = types.ModuleType("mha_jax.training.devices")
devices.use_cores = lambda run: None
jax = types.ModuleType("jax")  # importing the real one would take most of the test's time
jax.config = types.SimpleNamespace(update=lambda name, value: None)
jax.devices = lambda: [types.SimpleNamespace(platform="cpu", device_kind="cpu")]
jax.device_count = lambda: 1
sys.modules |= {"mha_jax.training": package, "mha_jax.training.loop": play, "mha_jax.training.devices": devices}
sys.modules["jax"] = jax

from mha_jax.specs import UserError
from mha_jax.sweeps import cell


def train(parts, *, cache_dir, should_stop, progress):
    ended = [play_one(*part, should_stop) for part in parts]
    return ended


def play_one(config, run, directory, report, should_stop):
    kept = pathlib.Path(directory) / "kept.txt"
    start = int(kept.read_text()) if kept.exists() else 0
    first = not (pathlib.Path(directory) / "tried.txt").exists()
    (pathlib.Path(directory) / "tried.txt").touch()
    with open(pathlib.Path(directory).parent.parent / "trace.txt", "a") as trace:
        trace.write(f"{pathlib.Path(directory).name} from {start}\\n")
    if run.name == "broken" or (run.name == "flaky" and first):
        return RuntimeError("planted")
    if run.name == "wrong":
        return UserError("the text is empty")
    if run.name == "greedy":
        os.kill(os.getpid(), 9)
    for step in range(start, run.training.steps):
        if should_stop():
            return "stopped"
        if run.name == "killed" and first and step == 5:
            os.kill(os.getpid(), 9)
        if run.name == "hangs" and first and step == 5:
            time.sleep(600)
        if run.name == "garbles" and first and step == 5:
            (pathlib.Path(directory) / "status.json").write_text("{")
        time.sleep({"slow": 0.3, "slower": 1.5}.get(run.name, 0.01))
        kept.write_text(str(step + 1))
        report({"step": step + 1, "seconds": {"train": 1.0}})
    return "done"


play.train, play.Part = train, lambda *arguments: arguments
sys.exit(cell.main(sys.argv[1:]))
"""


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "tiny.py"
    file.write_text(CONFIG)
    return str(file)


@pytest.fixture
def cell_command(tmp_path):
    file = tmp_path / "cell.py"
    file.write_text(textwrap.dedent(CELL))
    return [sys.executable, str(file)]
