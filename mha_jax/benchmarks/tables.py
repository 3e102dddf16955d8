"""Times as markdown, for the terminal and for docs/benchmarks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mha_jax.benchmarks import ablation, attention, decode
from mha_jax.benchmarks.train_step import FLOOR, OURS

Result = dict[str, Any]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with its first column to the left and all others to the right, padded so that it reads as plain text."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *others]) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def _under(table: str, *lines: str) -> str:
    """A table and what stands under it, a paragraph each."""
    return "\n\n".join([table, *lines])


def _pick(values: Mapping[str, Any], name: str, show: Callable[[Any], str]) -> str:
    """A value as it is shown; a dash where it was not measured."""
    return "-" if values.get(name) is None else show(values[name])


def _spread(summary: dict[str, float], digits: int) -> str:
    return f"{summary['median']:.{digits}f} ({summary['min']:.{digits}f}-{summary['max']:.{digits}f})"


def step_table(rows: Sequence[dict[str, Any]]) -> str:
    """One row a head count: median (least-greatest) milliseconds, tokens a second, and ours over each other, paired."""
    names = list(dict.fromkeys(name for row in rows for name in row["step_ms"]))
    others = [name for name in names if name not in (OURS, FLOOR)]
    header = ["heads x width", f"{OURS} ms", "tokens/s", f"{FLOOR} ms", "floor's share"]
    header += [cell for name in others for cell in (f"{name} ms", f"{OURS} / {name}")]

    def cells(row: dict[str, Any]) -> list[str]:
        ms, ratio = row["step_ms"], row["ratio"]
        start = [
            f"{row['num_heads']} x {row['qk_dim']}",
            _spread(ms[OURS], 1),
            f"{row['tokens_per_second'][OURS]:,.0f}",
        ]
        start += [_spread(ms[FLOOR], 1), f"{100 / ratio[FLOOR]['median']:.0f} %"]
        timed = [(_spread(ms[n], 1), _spread(ratio[n], 2)) if n in ms else ("-", "-") for n in others]
        return start + [cell for pair in timed for cell in pair]

    return markdown(header, [cells(row) for row in rows])


def train_step(result: Result) -> str:
    """Steps by head count, and the profiles where they were taken."""
    profiles = [f"{heads} heads\n\n{profile_table(rows)}" for heads, rows in result["profile"].items()]
    return _under(step_table(result["rows"]), *result["notes"], *profiles)


def profile_table(rows: Sequence[dict[str, Any]]) -> str:
    """One row a part: milliseconds in a step, its share of the step, its matrix products alone, and what is over."""
    step = rows[-1]["ms"]

    def cells(row: dict[str, Any]) -> list[str]:
        over = row["ms"] - row["matmul_ms"]
        return [
            row["part"],
            f"{row['ms']:.1f}",
            f"{100 * row['ms'] / step:.0f} %",
            f"{row['matmul_ms']:.1f}",
            f"{over:.1f}",
        ]

    return markdown(["part", "ms a step", "share", "its products alone, ms", "over, ms"], [cells(row) for row in rows])


def attention_tables(result: Result) -> str:
    """A mode each: one row a head count with every contestant's milliseconds, and what they plan to hold in memory."""
    parts = []
    for mode, rows in _by(result["rows"], "mode").items():
        names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
        ratios = [f"ours / {attention.RIVAL}", f"ours / h={rows[0]['fewest_heads']}", "floor's share", "of the rate"]

        def cells(row: dict[str, Any], names: list[str] = names) -> list[str]:
            start = [f"{row['num_heads']} x {row['qk_dim']}"]
            times = [_pick(row["ms"], name, lambda ms: _spread(ms, 1)) for name in names]
            rival = _pick(row["ratio"], attention.RIVAL, lambda ratio: _spread(ratio, 2))
            over = _spread(row["over_fewest_heads"], 2)
            share = f"{100 / row['ratio'][attention.FLOOR]['median']:.0f} %"
            return [*start, *times, rival, over, share, f"{100 * row['rate_share']:.0f} %"]

        def held(row: dict[str, Any], names: list[str] = names) -> list[str]:
            sizes = [_pick(row["peak_bytes"], name, lambda size: f"{size / 1e6:,.0f}") for name in names]
            return [f"{row['num_heads']} x {row['qk_dim']}", *sizes]

        header = ["heads x width", *(f"{name} ms" for name in names), *ratios]
        parts += [f"{mode}, {result['dtype']}", markdown(header, [cells(row) for row in rows])]
        parts += [f"{mode}, peak memory, MB", markdown(["heads x width", *names], [held(row) for row in rows])]
    rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in result["gflops"].items())
    return _under("\n\n".join(parts), f"Plain matrix product, GFLOP/s: {rates}.", *result["notes"])


def sparse_tables(result: Result) -> str:
    """A mode each: milliseconds by rule and length with the fitted exponent, and what the rule saves of dense."""
    parts = []
    for mode, rows in _by(result["rows"], "mode").items():
        lengths = list(dict.fromkeys(row["length"] for row in rows))
        fits = {fit["rule"]: fit["fit"] for fit in result["fits"] if fit["mode"] == mode}
        times, savings = [], []
        for rule, own in _by(rows, "rule").items():
            ms = {row["length"]: _spread(row["ms"], 1) for row in own}
            fit = _pick(fits, rule, lambda f: f"{f['exponent']:.2f} [{f['low']:.2f}, {f['high']:.2f}]")
            times.append([rule, *(ms.get(length, "-") for length in lengths), fit])
            for row in own:
                if "speedup" in row:
                    gains = [_spread(row["speedup"], 1), _spread(row["cost_ratio"], 2)]
                    savings.append([rule, str(row["length"]), f"{100 * row['visible']:.2f} %", *gains])
        header = ["rule", *(f"{length} ms" for length in lengths), "exponent [95 %]"]
        parts += [f"{mode}, {result['dtype']}", markdown(header, times)]
        if savings:
            header = ["rule", "length", "visible of dense", "times faster than dense", "time / (visible x dense)"]
            parts.append(markdown(header, savings))
    return _under("\n\n".join(parts), *result["notes"])


def decode_table(result: Result) -> str:
    """One row a length, head count and number of groups: milliseconds a token, bytes cached, and their rate."""
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["ms"]))
    others = [name for name in names if name != decode.OURS]
    header = ["length", "heads", "kv heads", "cache MB", *(f"{name} ms" for name in names), f"{decode.OURS} GB/s"]
    header += [f"{decode.OURS} / {name}" for name in others]

    def cells(row: dict[str, Any]) -> list[str]:
        sizes = [str(row["length"]), str(row["num_heads"]), str(row["num_kv_heads"]), f"{row['cache_bytes'] / 1e6:.1f}"]
        times = [_spread(row["ms"][name], 2) for name in names]
        rate = f"{row['gbytes_per_second'][decode.OURS]:.1f}"
        return [*sizes, *times, rate, *(_spread(row["ratio"][name], 2) for name in others)]

    return _under(markdown(header, [cells(row) for row in result["rows"]]), *result["notes"])


def memory_table(result: Result) -> str:
    """The process's most resident memory before and after, and XLA's plan."""
    header = ["heads", "length", "peak of the process GB", "before GB", "XLA's plan GB"]

    def cells(row: dict[str, Any]) -> list[str]:
        sizes = [
            _pick(row, name, lambda size: f"{size / 1e9:.2f}")
            for name in ("peak_bytes", "before_bytes", "planned_bytes")
        ]
        return [str(row["num_heads"]), str(row["length"]), *sizes]

    return markdown(header, [cells(row) for row in result["rows"]])


def layers_table(result: Result) -> str:
    """One row a depth and a way of running its layers: seconds to compile, milliseconds a step, megabytes planned."""
    header = ["layers, remat", "depth", "compile s", "step ms", "peak MB"]

    def cells(row: dict[str, Any]) -> list[str]:
        peak = _pick(row, "peak_bytes", lambda size: f"{size / 1e6:,.1f}")
        step = _spread(row["step_ms"], 1)
        return [f"{row['layers']}, {row['remat']}", str(row["num_layers"]), f"{row['compile_seconds']:.1f}", step, peak]

    return markdown(header, [cells(row) for row in result["rows"]])


def gates_table(result: Result) -> str:
    """One row a way of gating: milliseconds a step, and over the step without gates, round by round."""

    def cells(row: dict[str, Any]) -> list[str]:
        return [row["gates"], _spread(row["step_ms"], 1), _spread(row["ratio"], 3)]

    return markdown(["gates", "step ms", "over no gates"], [cells(row) for row in result["rows"]])


def pruned_table(result: Result) -> str:
    """One row a batch size: milliseconds of each contestant, and the pruned model over the others, round by round."""
    first = result["rows"][0]
    header = ["batch", *(f"{name} ms" for name in first["ms"]), *(f"pruned / {name}" for name in first["ratio"])]

    def cells(row: dict[str, Any]) -> list[str]:
        times = [_spread(ms, 2) for ms in row["ms"].values()]
        return [str(row["batch_size"]), *times, *(_spread(ratio, 2) for ratio in row["ratio"].values())]

    heads = "; ".join(f"{name}: {' + '.join(map(str, counts))}" for name, counts in result["heads"].items())
    return _under(markdown(header, [cells(row) for row in result["rows"]]), f"Heads of the layers: {heads}.")


def routing_table(result: Result) -> str:
    """One row a mode and number of heads in use: milliseconds of each way, its gain, FLOPs, what is left out."""
    ways = list(result["rows"][0]["ms"])
    gains = [f"all heads / {name}" for name in result["rows"][0]["speedup"]]
    header = ["mode", "heads in use", *(f"{name} ms" for name in ways), *gains, "FLOPs, gathered / gated", "left out"]

    def cells(row: dict[str, Any]) -> list[str]:
        times = [_spread(row["ms"][name], 1) for name in ways]
        ratios = [_spread(ratio, 2) for ratio in row["speedup"].values()]
        shares = [f"{row['flops']['gathered']:.2f}", f"{row['left_out']:.1%}"]
        return [row["mode"], str(row["active"]), *times, *ratios, *shares]

    return markdown(header, [cells(row) for row in result["rows"]])


def ablation_table(result: Result) -> str:
    """One row a way to leave out every head: seconds for all of them, its first call's, and its time over ours."""

    def cells(name: str, found: dict[str, Any], digits: int, first: str) -> list[str]:
        over = "1" if name in (ablation.OURS, ablation.ALL_HEADS) else _spread(found["ratio"], digits)
        return [name, _spread(found["summary"][name], digits), first, over]

    rows = [cells(name, result, 2, f"{seconds:.1f}") for name, seconds in result["first_seconds"].items()]
    rows += [cells(name, result["processes"], 1, "-") for name in result["processes"]["summary"]]
    heads = result["heads"]
    return _under(
        markdown(["way", f"seconds for {heads} heads", "first call, s", "over kept prefix"], rows),
        f"Losses of the first two differ by {result['difference']:.1e} nats a token at most. The last two are whole "
        f"processes, from start to end, each next to the other; the last is {heads} times one process with one head.",
    )


def _by(rows: Sequence[dict[str, Any]], key: str) -> dict[Any, list[dict[str, Any]]]:
    """Rows under each value of one of their fields, in order."""
    return {value: [row for row in rows if row[key] == value] for value in dict.fromkeys(row[key] for row in rows)}
