"""The sweep benchmark with cells that only play training."""

import json

import pytest

from experiments.bench import VERBS
from mha_jax.benchmarks import sweep
from mha_jax.specs import UserError
from mha_jax.sweeps.cell import Exit

ROW = {"step": 2, "seed": 0, "split": "validation", "name": "loss"}


def test_all_ways_are_given_the_same_cells_in_turns(monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    given, caches = [], []

    def run(packs, *, workers):
        given.append([len(pack) for pack in packs])
        caches.append(len({directory.workdir for pack in packs for directory in pack}))
        for directory in (directory for pack in packs for directory in pack):
            rate = directory.config["optimizer"]["learning_rate"]
            (directory.path / "metrics.jsonl").write_text(json.dumps({**ROW, "value": rate}) + "\n")
            directory.update(state="done")
        return Exit.DONE

    monkeypatch.setattr(sweep.local, "run", run)
    monkeypatch.setattr(sweep.data, "load", lambda *arguments: None)
    monkeypatch.setattr(sweep.preparation, "devices", lambda: {"platform": "cpu", "count": 1, "memory": None})
    result = VERBS["sweep"].measure(sweep.Setting(cells=3, steps=2, rounds=2, workers=2))
    assert given == [[1, 1, 1], [1, 1, 1], [1, 2], [1, 1, 1], [1, 2], [1, 1, 1]]
    assert caches == [3, 1, 1, 1, 1, 3]
    *apart_and_alone, packed = result["rows"]
    for other in apart_and_alone:
        gains = map(float.__truediv__, other["seconds"], packed["seconds"])
        assert packed["gain"][other["way"]]["max"] == pytest.approx(max(gains))
    assert packed["rate"]["max"] == pytest.approx(6 / min(packed["seconds"]))
    assert result["same"] and "are the same to the last bit" in VERBS["sweep"].table(result)


def test_a_compile_cache_that_all_would_share_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/programs")
    with pytest.raises(UserError, match="JAX_COMPILATION_CACHE_DIR=/programs would be shared"):
        sweep.measure(sweep.Setting())
