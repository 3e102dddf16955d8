"""Roles, relations and antecedents as a record for JSON, as rows, as lines to print, and as pictures."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from mha_jax.heads.capture import kind_of, layer_of
from mha_jax.heads.coreference import Antecedents
from mha_jax.heads.intervals import Estimate
from mha_jax.heads.reading import Found
from mha_jax.heads.relations import Relation
from mha_jax.heads.roles import GENERAL, Thresholds
from mha_jax.heads.shapes import SHAPES
from mha_jax.reporting.canvas import INK, MUTED, OURS, PAPER, RULE, STYLE, panels, save
from mha_jax.reporting.importance import KINDS

SYNTACTIC = "syntactic"
# Where a head looks, in strong colours; how it looks, in pale ones.
COLOURS = {
    "previous": "#2f74c0", "next": "#2a9d8f", "same": "#5b6fd0", "first": "#8f55b8", "aligned": "#2f8fc0",
    "sink": "#5f6b7a", "separator": "#a08060", "duplicate": "#c2478f", "induction": "#d23f3f", "rare": "#d9782b",
    SYNTACTIC: "#3d9140", "broad": "#d8e3ef", "long": "#e9dcc9", "narrow": "#e6d5e8",
}  # fmt: skip


class SeedFound(NamedTuple):
    """What was found in the model of one seed."""

    heads: dict[str, Found]
    relations: list[Relation]
    antecedents: list[Antecedents]


def record(found: Mapping[int, SeedFound], thresholds: Thresholds, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What roles.json holds.

    facts        "run", "step", "split", "treebank", "treebank_test", "coreference", "left_out": names of sentences
    thresholds   those of `heads.roles.Thresholds`
    seeds        {SEED: {"attentions", "relations", "coreference"}}
      attentions   {ATTENTION: {"heads": H, "examples": N,
                   "scores": {ROLE: {"mean", "low", "high", "chance"}}: lists of H numbers, null where nothing counts,
                   "role": the dominant role of each head or null, "roles": all that each head has,
                   "nearest": the role of where it looks that is most above chance, held or not, "strength": how far,
                   from 0 to 1; "strength_elsewhere": how far the most marked role but "same" is,
                   "shapes": {SHAPE: {"mean", "low", "high": lists of H shares of examples, "even": a share}} or null}}
                   A head that is "syntactic" is the best one of a relation, 10 points above the best offset.
      relations    [{"relation", "direction", "head": "encoder/0/attention:1", "searched", "accuracy", "offset",
                   "baseline", "gain", "chance", "occurrences", "chosen_on", "left_out", "best", "syntactic"}], where
                   accuracy, baseline and gain are {"mean", "low", "high"}
      coreference  [{"kind", "who", "searched", "accuracy", "gain" or null, "mentions"}]
    seed_counts  {ATTENTION: {ROLE: how many heads have it as their role, a number a seed}}
    """
    seeds = {str(seed): _seed(one, thresholds) for seed, one in found.items()}
    return {
        **facts,
        "thresholds": dataclasses.asdict(thresholds),
        "seeds": seeds,
        "seed_counts": _counts([one["attentions"] for one in seeds.values()]),
    }


def _seed(found: SeedFound, thresholds: Thresholds) -> dict[str, Any]:
    syntactic = {str(row.head) for row in found.relations if row.best and row.syntactic}
    return {
        "attentions": {name: _attention(name, one, thresholds, syntactic) for name, one in found.heads.items()},
        "relations": [{**_plain(row), "head": str(row.head), "syntactic": row.syntactic} for row in found.relations],
        "coreference": [_plain(row) for row in found.antecedents],
    }


def _attention(name: str, found: Found, thresholds: Thresholds, syntactic: set[str]) -> dict[str, Any]:
    table, held, dominant = found.roles, found.roles.held(thresholds), found.roles.dominant(thresholds)
    roles, role = [], []
    for head, main in enumerate(dominant):
        is_syntactic = f"{name}:{head}" in syntactic
        role.append(SYNTACTIC if is_syntactic and (main is None or main in GENERAL) else main)
        roles.append([own for own, has in held.items() if has[head]] + [SYNTACTIC] * is_syntactic)
    parts = ("mean", "low", "high", "chance")
    scores = {own: {part: _numbers(getattr(table, part)[own]) for part in parts} for own in table.mean}
    shapes = None
    if found.shapes is not None and found.even is not None:
        shapes = {
            shape: {part: _numbers(x[:, i]) for part, x in zip(parts, found.shapes, strict=False)}
            | {"even": round(float(found.even[:, i].mean()), 6)}
            for i, shape in enumerate(SHAPES)
        }
    counts = {"heads": len(role), "examples": found.examples}
    nearest, strength = table.nearest()
    found_roles = {"role": role, "roles": roles, "nearest": nearest, "strength": _numbers(strength)}
    found_roles["strength_elsewhere"] = _numbers(table.nearest(but=("same",))[1])
    return {**counts, "scores": scores, **found_roles, "shapes": shapes}


def _numbers(values: np.ndarray) -> list[float | None]:
    return [round(float(x), 6) if np.isfinite(x) else None for x in values]


def _plain(row: Relation | Antecedents) -> dict[str, Any]:
    fields = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    estimates = {name: value for name, value in fields.items() if isinstance(value, Estimate)}
    return fields | {
        name: dict(zip(("mean", "low", "high"), _numbers(np.array(one)), strict=True))
        for name, one in estimates.items()
    }


def _counts(seeds: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[int]]]:
    found = {}
    for name in seeds[0]:
        roles = [one[name]["role"] for one in seeds]
        present = [role for role in COLOURS if any(role in own for own in roles)]
        found[name] = {role: [own.count(role) for own in roles] for role in present}
    return found


def rows(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of roles.csv: one a seed and head, each score with its low, high and chance."""
    found = []
    for seed, one in told["seeds"].items():
        for name, own in one["attentions"].items():
            for head in range(own["heads"]):
                row = {"run": told["run"], "seed": seed, "kind": kind_of(name), "layer": layer_of(name), "head": head}
                row |= {"role": own["role"][head], "roles": " ".join(own["roles"][head])}
                row |= {part: own[part][head] for part in ("nearest", "strength", "strength_elsewhere")}
                for role, score in own["scores"].items():
                    row |= {f"{role} {part}".removesuffix(" mean"): x[head] for part, x in score.items()}
                for shape, score in (own["shapes"] or {}).items():
                    row |= {f"share {shape}": score["mean"][head]}
                found.append(row)
    return found


def flat_rows(told: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    """The lines of relations.csv or coreference.csv: {"mean", "low", "high"} become three columns."""
    found = []
    for seed, one in told["seeds"].items():
        for own in one[part]:
            row: dict[str, Any] = {"run": told["run"], "seed": seed}
            for name, value in own.items():
                if isinstance(value, dict):
                    row |= {f"{name} {end}".removesuffix(" mean"): x for end, x in value.items()}
                else:
                    row[name] = value
            found.append(row)
    return found


def tables(told: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Tables for the page and the terminal: {"caption", "columns", "rows"}."""
    seeds = list(told["seeds"])
    counts = [
        [name, role, *map(str, numbers)]
        for name, roles in told["seed_counts"].items()
        for role, numbers in roles.items()
    ]
    heads = sum(own["heads"] for own in told["seeds"][seeds[0]]["attentions"].values())
    yield {
        "caption": f"How many of the {heads} heads of each seed have a role. A head has one where the 95 % interval of "
        "its score is above chance and above the role's threshold; one with several is named by that most above "
        "chance. Numbers of heads mean nothing from seed to seed, layers do.",
        "columns": ["attention", "role", *(f"seed {seed}" for seed in seeds)],
        "rows": counts or [["–"] * (2 + len(seeds))],
    }
    first = told["seeds"][seeds[0]]
    yield {
        "caption": f"Seed {seeds[0]}: for each role the head whose score is most above chance, in percent, with its "
        "95 % interval over examples. The best of many heads is above chance by its choice alone, though by little.",
        "columns": ["role", "head", "score", "chance", "the role from"],
        "rows": list(_best_of_roles(first["attentions"], told["thresholds"])),
    }
    if first["relations"]:
        yield {
            "caption": f"Seed {seeds[0]}: for each relation the best of {first['relations'][0]['searched']} heads and "
            "the best fixed offset, chosen on other sentences than these scores are of. dependent: the dependent "
            "attends to its head; head: the head attends to the dependent. Intervals are 95 %, over sentences.",
            "columns": ["relation", "n", "not visible", "direction", "head", "accuracy", "offset", "baseline", "gain"],
            "rows": [_relation_row(row) for row in first["relations"] if row["best"]],
        }
    if first["coreference"]:
        yield {
            "caption": f"Seed {seeds[0]}: how often the mention attended to most, of those before, is an antecedent. "
            "Heads were chosen on other texts than these.",
            "columns": ["mentions", "n", "by", "accuracy", "gain over nearest"],
            "rows": [
                [row["kind"], str(row["mentions"]), row["who"], _percent(row["accuracy"]),
                 _percent(row["gain"], sign=True) if row["gain"] else "–"]
                for row in first["coreference"]
            ],
        }  # fmt: skip


def _best_of_roles(attentions: Mapping[str, Any], thresholds: Mapping[str, float]) -> Iterator[list[str]]:
    for role in (role for role in COLOURS if role not in GENERAL):
        scores = [
            (f"{name}:{head}", {part: x[head] for part, x in own["scores"][role].items()})
            for name, own in attentions.items()
            for head in range(own["heads"] if role in own["scores"] else 0)
        ]
        scores = [(head, score) for head, score in scores if score["mean"] is not None]
        if scores:
            head, best = max(scores, key=lambda one: one[1]["mean"] - one[1]["chance"])
            least = Thresholds(**thresholds).of(role)
            yield [role, head, _percent(best), f"{100 * best['chance']:.1f}", f"{100 * least:.0f}"]


def _relation_row(row: Mapping[str, Any]) -> list[str]:
    counts = [row["relation"], str(row["occurrences"]), str(row["left_out"]), row["direction"], row["head"]]
    ours = [_percent(row["accuracy"]), f"{row['offset']:+d}", _percent(row["baseline"])]
    return [*counts, *ours, _percent(row["gain"], sign=True)]


def _percent(one: Mapping[str, float | None], sign: bool = False) -> str:
    """ "41.2 (38.0 to 44.4)", in percent."""
    form = "{:+.1f}" if sign else "{:.1f}"
    mean, low, high = ("–" if (x := one[part]) is None else form.format(100 * x) for part in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def draw(told: Mapping[str, Any], foot: str, directory: epath.Path) -> None:
    """Writes roles.svg/.png, and relations.svg/.png where a treebank was read."""
    seeds = {seed: one["attentions"] for seed, one in told["seeds"].items()}
    _draw_roles(seeds, foot, directory)
    if any(one["relations"] for one in told["seeds"].values()):
        _draw_relations(told["seeds"], foot, directory)


def _draw_roles(seeds: Mapping[str, dict[str, Any]], foot: str, directory: epath.Path) -> None:
    """Layers by heads in the colour of each head's role; a row of panels a seed, a column a kind of attention."""
    names = list(next(iter(seeds.values())))
    kinds = {kind: [name for name in names if kind_of(name) == kind] for kind in KINDS}
    kinds = {kind: own for kind, own in kinds.items() if own}
    shown = {role for one in seeds.values() for own in one.values() for role in own["role"] if role}
    layers = max(map(len, kinds.values()), default=1)
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = panels(len(seeds), max(len(kinds), 1), 0.9 + len(seeds) * (0.7 + 0.22 * layers))
        for i, (seed, one) in enumerate(seeds.items()):
            for j, (kind, own) in enumerate(kinds.items()):
                _role_panel(axes[i, j], {name: one[name]["role"] for name in own})
                axes[i, j].set_title(f"seed {seed} · {KINDS[kind]}", fontsize=8)
            axes[i, 0].set_ylabel("layer")
        patches = [Patch(color=COLOURS[role], label=role) for role in COLOURS if role in shown]
        patches.append(Patch(color=RULE, label="no role"))
        figure.legend(handles=patches, loc="outside upper center", ncols=8, fontsize=7)
        save(figure, "roles", foot, directory)


def _role_panel(axis: Axes, roles: Mapping[str, list[str | None]]) -> None:
    widest = max(1, *map(len, roles.values()))
    grid = np.ones((len(roles), widest, 3))
    for y, own in enumerate(roles.values()):
        for x, role in enumerate(own):
            grid[y, x] = to_rgb(COLOURS[role] if role else RULE)
    axis.imshow(grid, aspect="auto")
    axis.set_xticks(np.arange(widest + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(len(roles) + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="minor", length=0)
    axis.set_xticks(range(0, widest, 1 + widest // 17))
    axis.set_yticks(range(len(roles)), [str(layer_of(name)) for name in roles])


def _draw_relations(seeds: Mapping[str, Any], foot: str, directory: epath.Path) -> None:
    """Accuracy of each relation's best head, a point a seed, beside the best offset."""
    best = {seed: {row["relation"]: row for row in one["relations"] if row["best"]} for seed, one in seeds.items()}
    relations = list(dict.fromkeys(relation for rows in best.values() for relation in rows))
    with mpl.rc_context(STYLE):
        figure, axes = panels(1, 1, 0.9 + 0.26 * len(relations))
        axis = axes[0, 0]
        for number, rows in enumerate(best.values()):
            shift = 0.5 * ((number + 0.5) / len(best) - 0.5)
            for part, colour, marker in (("baseline", PAPER, "|"), ("accuracy", OURS, "o")):
                found = [(relations.index(name), row[part]) for name, row in rows.items()]
                y, x = np.array([place for place, _ in found]), np.array([one["mean"] for _, one in found])
                ends = np.array([[one["mean"] - one["low"], one["high"] - one["mean"]] for _, one in found]).T
                label = {"baseline": "best offset", "accuracy": "best head"}[part] if number == 0 else None
                axis.errorbar(100 * x, y + shift, xerr=100 * np.maximum(ends, 0), fmt=marker, color=colour,
                              markersize=4 if marker == "o" else 9, elinewidth=0.8, label=label)  # fmt: skip
        axis.set_yticks(range(len(relations)), relations, fontsize=8)
        axis.set_ylim(len(relations) - 0.5, -0.5)
        axis.set_xlim(0, 100)
        axis.set_xlabel("found, % (a point a seed, 95 % intervals over sentences)", fontsize=8, color=INK)
        axis.tick_params(axis="x", labelsize=8, colors=MUTED)
        figure.legend(loc="outside upper right", ncols=2, fontsize=8)
        save(figure, "relations", foot, directory)
