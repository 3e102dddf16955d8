"""The routing benchmark: its FLOPs by hand, and a tiny run from flags to table."""

import json

import pytest

from experiments import bench
from mha_jax.benchmarks import routing
from mha_jax.specs import UserError


def test_flops_count_shared_heads_whole_and_routed_heads_by_their_queries():
    setting = routing.Setting(num_heads=4, active=(2,), d_model=8, length=10, slack=0)
    spec = setting.routing(2)
    assert (spec.shared, spec.top_k, setting.capacity(2)) == (0, 2, 5)
    # K = V = 2; half of the queries of 4 heads; keys and values of 4 heads; 4 scores
    projections = 2 * 8 * (2 * 2 * 2 + 2 * 4 * 2 + 4)
    assert routing.flops(setting, 2, 5) == projections + 2 * 10 * 2 * (2 + 2)


def test_more_heads_in_use_than_there_are_is_refused():
    with pytest.raises(UserError, match="active=5 is more than num_heads=4"):
        routing.Setting(num_heads=4, active=(5,))
    with pytest.raises(UserError, match="'mohx' is not one of"):
        routing.Setting(kind="mohx")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "active"), [("moh", [3, 1]), ("moa", [3])], ids=["moh", "moa"])
def test_it_prints_a_table_and_writes_json(kind, active, tmp_path, capsys):
    out = tmp_path / "routing.json"
    sizes = [
        "--num_heads=4",
        f"--active={','.join(map(str, active))}",
        "--d_model=8",
        "--length=16",
        "--batch_size=2",
        "--rounds=2",
    ]
    assert bench.main(["bench", "routing", f"--kind={kind}", f"--out={out}", *sizes]) == 0
    assert "heads in use" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [row["active"] for row in rows] == active
    for row in rows:
        assert set(row["ms"]) == {"all heads", "gated", "gathered", "so few heads"}
        assert 0 <= row["left_out"] < 1 and row["flops"]["gathered"] < 1
