"""The script: flags from settings, a table, JSON and a figure of every benchmark."""

import json

import pytest

from experiments import bench, cli, rules
from mha_jax.benchmarks import attention, plots, tables
from mha_jax.specs import UserError

TINY = {
    "attention": ["--heads=3", "--batch_size=4", "--length=14", "--d_model=12", "--matmul_size=16", "--devices=2"],
    "sparse": ["--lengths=16,32,64", "--fit_from=16", "--rules=dense,window", "--num_heads=2", "--d_model=6"],
    "decode": ["--heads=4", "--num_kv_heads=1,4", "--lengths=7", "--d_model=12", "--batch_size=4", "--devices=2"],
    "memory": ["--length=23", "--num_heads=3", "--d_model=12"],
}
WORDS = {
    "attention": [
        "forward+backward, peak memory, MB",
        "| 3 x 4",
        "jax.nn on one device ms",
        "floor's share",
        "GFLOP/s",
    ],
    "sparse": ["exponent [95 %]", "| window 256", "time / (visible x dense)"],
    "decode": ["kv heads", "GB/s", "read the cache ms"],
    "memory": ["peak of the process GB"],
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", TINY)
def test_every_benchmark_prints_a_table_and_writes_json_and_a_figure(verb, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mha_jax.benchmarks.environment.torch_device", lambda: None)
    out = tmp_path / "made" / f"{verb}.json"
    rounds = [] if verb == "memory" else ["--rounds=2"]
    assert bench.main(["bench", verb, f"--out={out}", *rounds, *TINY[verb]]) == 0
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert all(words in printed for words in WORDS[verb]), printed
    assert result["benchmark"] == verb and result["rows"] and result["environment"]["versions"]["jax"]
    assert result["command"].startswith(f"python -m experiments.bench {verb}")
    drawn = [] if verb == "memory" else [".png", ".svg"]
    assert sorted(path.suffix for path in out.parent.iterdir()) == [".json", *drawn]
    for row in result["rows"]:
        seconds = row.get("seconds", {})
        for values in seconds.values() if isinstance(seconds, dict) else [seconds]:
            assert len(values) == 2


def spread(median):
    return {"median": median, "min": median / 2, "max": 2 * median}


def attention_row(num_heads, **ms):
    names = {attention.OURS: 4.0, attention.FLOOR: 1.0} | {name.replace("_", " "): value for name, value in ms.items()}
    return {
        "mode": "forward",
        "num_heads": num_heads,
        "qk_dim": 12 // num_heads,
        "ms": {name: spread(value) for name, value in names.items()},
        "ratio": {name: spread(4.0 / value) for name, value in names.items() if name != attention.OURS},
        "fewest_heads": 1,
        "over_fewest_heads": spread(1.0),
        "peak_bytes": dict.fromkeys(names, None) | {attention.OURS: 3_000_000},
        "rate_share": 0.25,
    }


def test_a_contestant_that_ran_at_some_head_counts_only_has_a_dash_at_the_others(tmp_path):
    rows = [attention_row(1, PyTorch_SDPA=2.0), attention_row(3)]
    result = {"dtype": "float32", "rows": rows, "notes": ["a note"], "gflops": {"JAX on one device": 12.3}}
    times, memory = [part.splitlines() for part in tables.attention_tables(result).split("\n\n")[1:5:2]]
    one, three = ([cell.strip() for cell in line.split("|")[1:-1]] for line in times[2:])
    assert one[:4] == ["1 x 12", "4.0 (2.0-8.0)", "1.0 (0.5-2.0)", "2.0 (1.0-4.0)"]
    assert one[4:] == ["2.00 (1.00-4.00)", "1.00 (0.50-2.00)", "25 %", "25 %"]
    assert three[3:5] == ["-", "-"]
    assert [cell.strip() for cell in memory[2].split("|")[1:-1]] == ["1 x 12", "3", "-", "-"]
    assert tables.attention_tables(result).endswith("GFLOP/s: JAX on one device 12.\n\na note")
    environment = {"processor": "P", "cores": 2, "device": "cpu", "versions": {"jax": "1"}}
    plots.write(plots.attention_figure, {**result, "environment": environment}, tmp_path / "figure.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.png", "figure.svg"]


def test_the_flags_of_layers_are_those_of_its_measurement(monkeypatch, capsys):
    given = {}

    def measure(rounds, **sizes):
        given.update(sizes, rounds=rounds)
        way = {"layers": "scan", "remat": "block", "compile_seconds": 1.26, "step_ms": spread(2.0), "peak_bytes": None}
        return [{"num_layers": depth, **way} for depth in sizes["depths"]]

    monkeypatch.setattr("mha_jax.benchmarks.layers.measure_layers", measure)
    assert bench.main(["bench", "layers", "--depths=2,5", "--d_ff=7"]) == 0
    assert (given["depths"], given["d_ff"], given["rounds"], given["d_model"]) == ((2, 5), 7, 5, 64)
    line = capsys.readouterr().out.splitlines()[3]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["scan, block", "5", "1.3", "2.0 (1.0-4.0)", "-"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "say what to time, one of attention, sparse, decode, memory"),
        (["nothing"], "say what to time"),
        (["attention", "--heads=4,x"], "--heads=4,x must be positive integers"),
        (["attention", "--heads="], "--heads= must be positive integers"),
        (["attention", "--contestants=torch"], "contestants='torch' is in none of mha_jax auto"),
        (["sparse", "--rules="], "--rules= names nothing; dense,window"),
        (["attention", "--out=/dev/null/x.json"], "--out=/dev/null/x.json cannot be written"),
        (["attention", "--heads=5"], "d_model=512 is not a multiple of num_heads=5"),
        (["attention", "--modes=backward"], "modes='backward' is not one of"),
        (["attention", "--rounds=0"], "rounds"),
        (["sparse", "--heads=4"], "heads"),
        (["decode", "surplus"], "'surplus' is not understood"),
        (["decode", "sparse"], "say what to time"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(argv, words):
    with pytest.raises(UserError, match=words):
        bench.main(["bench", *argv])


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path):
    (tmp_path / "old").write_text("kept")
    cli.check_writable("out", tmp_path / "old")
    cli.check_writable("out", tmp_path / "made" / "new")
    assert (tmp_path / "old").read_text() == "kept" and not list((tmp_path / "made").iterdir())
    with pytest.raises(UserError, match=r"--out=/dev/null/x\.png cannot be written"):
        rules.main(["rules", "--out=/dev/null/x"])


def test_help_names_the_benchmarks_and_a_benchmarks_help_its_flags(capsys):
    assert bench.main(["bench", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{verb} " in printed for verb in bench.VERBS)
    with pytest.raises(SystemExit):
        bench.main(["bench", "sparse", "--help"])
    assert "--dense_limit" in capsys.readouterr().out
