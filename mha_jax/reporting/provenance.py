"""What the numbers rest on: said under every table and figure."""

from typing import Any

from mha_jax.config import flatten
from mha_jax.reporting.claims import allowed_error
from mha_jax.reporting.results import Cell, Results
from mha_jax.reporting.tables import count, head_shape
from mha_jax.reporting.trials import notes
from mha_jax.sweeps.seeds import in_words

_SETTING = {
    "model.num_layers": "layers",
    "model.d_model": "d_model",
    "model.d_ff": "d_ff",
    "data.length": "length",
    "data.batch_size": "batch",
    "data.batch_tokens": "batch tokens",
    "training.steps": "steps",
    "optimizer.learning_rate": "learning rate",
    "optimizer.schedule": "schedule",
}
_HOW_TO_READ = (
    "mean ± half of the 95 % t interval over n seeds, loss in nats a token; Δ is the cell minus the base, paired "
    "by seed, with its 95 % interval; p is its two-sided t-test, adjusted over the rows (Holm 1979)"
)


def caption(results: Results) -> list[tuple[str, str]]:
    """Name and text of everything a reader needs to believe or repeat the table, in order of weight."""
    paper = results.sweep.get("paper")
    lines = [
        ("how to read", _HOW_TO_READ),
        ("held fixed", held_fixed(results)),
        ("seeds", _seeds(results)),
        *notes(results),
        ("base", results.label(results.base.overrides) if results.base else "none"),
        ("config", config(results)),
        ("commit", _each(results, "commit") or "not a git checkout"),
        ("versions", _versions(results)),
        ("devices", _each(results, "devices") or "not recorded"),
        ("data", _data(results)),
        ("BLEU", _each(results, "bleu_signature")),
        ("paper", f"{paper.get('source')} (numbers: {paper.get('confidence')})" if paper else ""),
    ]
    return [(name, text) for name, text in lines if text]


def footer(results: Results) -> str:
    """One line for the foot of a figure."""
    commits = _each(results, "commit")
    digest = next((d["sha256"] for run in results.runs if (d := run.status.get("data")) and "sha256" in d), None)
    parts = [
        config(results),
        f"commit {commits.split(', ')[0][:12]}" if commits else None,
        f"data {digest[:12]}" if digest else None,
        f"seeds {in_words(seed for batch in results.batches for seed in batch)}",
        _each(results, "device_kind"),
    ]
    return "  ·  ".join(part for part in parts if part)


def config(results: Results) -> str:
    """The config file, its profile and the head of its sha256."""
    sweep = results.sweep
    profile = f":{sweep['profile']}" if sweep.get("profile") else ""
    return f"{sweep.get('config_file', '?')}{profile} (sha256 {str(sweep.get('config_sha256', '?'))[:12]})"


def held_fixed(results: Results) -> str:
    """What all cells have in common: heads times width, parameters, and the settings that no cell changes."""
    cells = [cell for cell in results.cells if cell.config]
    parts = []
    for product, name in (("d_k", "heads × d_k"), ("d_v", "heads × d_v")):
        values = {_product(cell, product) for cell in cells}
        if len(values) == 1 and None not in values:
            parts.append(f"{name} = {values.pop()}")
    if not parts and len(widths := {head_shape(cell)["d_k"] for cell in cells}) == 1 and None not in widths:
        parts.append(f"head size d_k = {widths.pop()}")
    counts = {cell.status["parameters"] for cell in cells if "parameters" in cell.status}
    if counts:
        parts.append(
            f"{count(counts.pop())} parameters"
            if len(counts) == 1
            else f"parameters vary from {count(min(counts))} to {count(max(counts))}"
        )
    flats = [flatten(cell.config or {}) for cell in cells]
    for field, name in _SETTING.items():
        values = {str(flat.get(field)) for flat in flats} - {"None"}
        if len(values) == 1 and field not in results.tuned:
            parts.append(f"{name} {values.pop()}")
    return ", ".join(parts)


def _product(cell: Cell, width: str) -> int | None:
    shape = head_shape(cell)
    return shape["h"] * shape[width] if isinstance(shape["h"], int) and isinstance(shape[width], int) else None


def _seeds(results: Results) -> str:
    batches = [batch for batch in results.batches if batch]
    seeds = [seed for batch in batches for seed in batch]
    if len(batches) < 2:
        return f"{', '.join(map(str, seeds))} (n = {len(seeds)})" if seeds else "not recorded"
    return (
        f"{in_words(seeds)} (n = {len(seeds)}: {' + '.join(str(len(batch)) for batch in batches)} seeds, added in "
        f"{len(batches)} batches after a look at the earlier ones: intervals and p-values are those of a fixed n, "
        f"claims are held at p ≤ {allowed_error(len(batches)):g} instead of {allowed_error(1):g})"
    )


def _each(results: Results, fact: str) -> str:
    """The distinct values that the runs, or else the sweep, recorded."""
    found = [run.status[fact] for run in results.runs if run.status.get(fact)] or [results.sweep.get(fact)]
    return ", ".join(dict.fromkeys(_words(value) for value in found if value))


def _words(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    if {"count", "platform"} <= value.keys():
        return f"{value['count']} × {value.get('kind', value['platform'])}"
    return " ".join(f"{k} {v}" for k, v in value.items())


def _versions(results: Results) -> str:
    found = results.sweep.get("versions") or next(
        (run.status["versions"] for run in results.runs if "versions" in run.status), {}
    )
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _data(results: Results) -> str:
    return "; ".join(dict.fromkeys(_fingerprint(run.status["data"]) for run in results.runs if run.status.get("data")))


def _fingerprint(data: dict[str, Any]) -> str:
    splits = data.get("splits", {})
    sizes = [
        f"{name} {' '.join(f'{count(v)} {k}' for k, v in facts.items() if isinstance(v, int))}"
        for name, facts in splits.items()
        if isinstance(facts, dict)
    ]
    plain = [f"{k} {v}" for k, v in data.items() if k != "splits" and not isinstance(v, (dict, list))]
    return ", ".join(plain + sizes)
