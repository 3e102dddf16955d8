"""What a paper says about heads, checked against RUN/heads/importance.json, curve.json, roles.json and probes.json.

A claim is a dict `{"text", "less", "than", "margin"}`: `less` + margin is below `than`, seed by seed. Each of the two
is a number of every seed, described by a dict:

  {"curve": METRIC, "kind", "order", "removed"}   a point of a pruning curve, its draws averaged, times "times"
  {"significant": MEASURE, "level"}               the share of heads whose p-value (Holm) is below the level
  {"best_alone": KIND, "layer"}                   what the loss rises by when only an attention's best head is kept;
                                                  without a layer the median over layers
  {"helped": MEASURE, "level"}                    the share of heads without which the loss is lower, by the same p
  {"relation": NAME, "part"}                      of a relation's best head "accuracy", "gain", or "baseline": the best
                                                  offset's accuracy; all as shares
  {"shapes": [SHAPE, ...]}                        the share of attention maps that have one of these shapes
  {"graph": PART}                                 an attachment score of the attention-graph probe, as a share: "probe",
                                                  "right_branching", "best_offset" or "best_head"
  {"value": x}                                    a number that the claim names itself
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mha_jax.reporting.claims import Verdict
from mha_jax.reporting.statistics import paired
from mha_jax.specs import UserError
from mha_jax.sweeps.store import read_json

Point = Mapping[str, Any]
_KINDS = {"encoder": "encoder/{}/attention", "decoder": "decoder/{}/attention", "cross": "decoder/{}/cross_attention"}


def check_cuts(claims: Sequence[Mapping[str, Any]], directory: epath.PathLike) -> list[Verdict]:
    """Decides each claim by the two-sided 95 % t interval of the difference over seeds.

    Held where all of it lies above the margin, not held where none does, else undecided; so is what lacks a file, a
    point or a second seed. Raises: UserError for a claim that is not understood.
    """
    found = {}
    for name in ("importance", "curve", "roles", "probes"):
        file = epath.Path(directory) / f"{name}.json"
        found[name] = read_json(file) if file.exists() else None
    return [_check(claim, found) for claim in claims]


def as_markdown(verdicts: Sequence[Verdict]) -> str:
    """A table: what is claimed, held / not held / undecided, and the numbers."""
    lines = ["| claim | verdict | what was measured |", "| --- | --- | --- |"]
    return "\n".join(lines + [f"| {v.text} | {v.status} | {v.sentence} |" for v in verdicts]) + "\n"


def _check(claim: Mapping[str, Any], found: Mapping[str, Any]) -> Verdict:
    if not {"text", "less", "than"} <= claim.keys():
        raise UserError(f"claim {dict(claim)!r} needs 'text', 'less' and 'than'")
    margin = claim.get("margin", 0.0)
    less, than = (_values(claim[side], found) for side in ("less", "than"))
    seeds = _common(less, than)
    difference = paired({s: _of(than, s) for s in seeds}, {s: _of(less, s) for s in seeds})
    if difference is None or difference.low is None or difference.high is None:
        return Verdict(claim["text"], "undecided", difference, f"{len(seeds)} seeds have both numbers: no interval.")
    status = "held" if difference.low > margin else "not held" if difference.high <= margin else "undecided"
    means = [float(np.mean([_of(side, s) for s in seeds])) for side in (less, than)]
    return Verdict(
        claim["text"],
        status,
        difference,
        f"{_label(claim['less'])} {means[0]:.4g}, {_label(claim['than'])} {means[1]:.4g}: difference "
        f"{difference.mean:+.4g}, 95 % interval {difference.low:+.4g} to {difference.high:+.4g}, must exceed "
        f"{margin:.3g}; n = {difference.n} seeds.",
    )


def _common(less: Mapping[Any, float], than: Mapping[Any, float]) -> list[int]:
    """The seeds that both sides have; a given value, under None, stands for every seed."""
    sides = [side for side in (less, than) if None not in side]
    return sorted(set.intersection(*(set(side) for side in sides))) if sides else []


def _of(side: Mapping[Any, float], seed: int) -> float:
    return side[None] if None in side else side[seed]


def _values(point: Point, found: Mapping[str, Any]) -> dict[Any, float]:
    """A number for each seed; for a given value, under None."""
    if "value" in point:
        return {None: float(point["value"])}
    if "curve" in point:
        return _curve(point, found["curve"])
    if "significant" in point:
        return _significant(point, found["importance"])
    if "best_alone" in point:
        return _best_alone(point, found["importance"])
    if "helped" in point:
        return _helped(point, found["importance"])
    if "relation" in point:
        return _relation(point, found["roles"])
    if "shapes" in point:
        return _shapes(point, found["roles"])
    if "graph" in point:
        return _graph(point, found["probes"])
    raise UserError(
        f"{dict(point)!r} is no point; known are curve, significant, best_alone, helped, relation, shapes, graph and "
        "value"
    )


def _curve(point: Point, curve: Any) -> dict[Any, float]:
    draws: dict[Any, list[float]] = {}
    for row in [] if curve is None else curve["rows"]:
        same = (row["kind"], row["order"]) == (point["kind"], point["order"])
        if same and abs(row["removed"] - point["removed"]) < 1e-9 and point["curve"] in row:
            draws.setdefault(row["seed"], []).append(row[point["curve"]])
    return {seed: point.get("times", 1.0) * float(np.mean(values)) for seed, values in draws.items()}


def _significant(point: Point, importance: Any) -> dict[Any, float]:
    shares = {}
    for seed, measures in _seeds(importance).items():
        if point["significant"] in measures:
            heads = measures[point["significant"]]["heads"]
            p_values = [p for one in heads.values() for p in one["p_holm"] or ()]
            if p_values:
                shares[seed] = float(np.mean([p is not None and p < point["level"] for p in p_values]))
    return shares


def _best_alone(point: Point, importance: Any) -> dict[Any, float]:
    rises = {}
    for seed, measures in _seeds(importance).items():
        heads = measures.get("keep_one", {}).get("heads", {})
        pattern = _KINDS[point["best_alone"]]
        layers = [name for name in heads if name == pattern.format(name.split("/")[1])]
        best = [-max(heads[name]["mean"]) for name in layers if heads[name]["mean"]]
        if best:
            rises[seed] = float(np.median(best)) if point.get("layer") is None else best[point["layer"]]
    return rises


def _helped(point: Point, importance: Any) -> dict[Any, float]:
    shares = {}
    for seed, measures in _seeds(importance).items():
        heads = measures.get(point["helped"], {}).get("heads", {}).values()
        pairs = [pair for one in heads for pair in zip(one["mean"], one["p_holm"] or (), strict=False)]
        if pairs:
            shares[seed] = float(np.mean([rise < 0 and p is not None and p < point["level"] for rise, p in pairs]))
    return shares


def _relation(point: Point, roles: Any) -> dict[Any, float]:
    return {
        seed: row[point["part"]]["mean"]
        for seed, one in _seeds(roles).items()
        for row in one["relations"]
        if row["best"] and row["relation"] == point["relation"]
    }


def _shapes(point: Point, roles: Any) -> dict[Any, float]:
    shares = {}
    for seed, one in _seeds(roles).items():
        of_heads = [
            sum(own["shapes"][shape]["mean"][head] for shape in point["shapes"])
            for own in one["attentions"].values()
            if own["shapes"]
            for head in range(own["heads"])
        ]
        if of_heads:
            shares[seed] = float(np.mean(of_heads))
    return shares


def _graph(point: Point, probes: Any) -> dict[Any, float]:
    graphs = {seed: one.get("graph") for seed, one in _seeds(probes).items()}
    return {seed: graph[point["graph"]]["mean"] for seed, graph in graphs.items() if graph}


def _seeds(told: Any) -> dict[int, Any]:
    return {} if told is None else {int(seed): one for seed, one in told["seeds"].items()}


def _label(point: Point) -> str:
    if "value" in point:
        return "the limit"
    if "curve" in point:
        order = point["order"].replace("_", " ")
        times = f"{point['times']:g} times the " if "times" in point else ""
        return f"{times}{point['curve']} at {100 * point['removed']:.0f} % of {point['kind']} removed ({order})"
    if "significant" in point:
        return f"share of heads with p < {point['level']:g} ({point['significant'].replace('_', ' ')})"
    if "helped" in point:
        return f"share of heads that help by being cut, p < {point['level']:g} ({point['helped'].replace('_', ' ')})"
    if "relation" in point:
        whose = "best offset" if point["part"] == "baseline" else "best head"
        return f"{point['part']} of the {whose}, {point['relation']}"
    if "graph" in point:
        return f"attachment score, {point['graph'].replace('_', ' ')}"
    if "shapes" in point:
        return f"share of maps that are {' or '.join(point['shapes'])}"
    layer = point.get("layer")
    which = "median layer" if layer is None else "last layer" if layer == -1 else f"layer {layer}"
    return f"loss rise with the best head alone, {point['best_alone']}, {which}"
