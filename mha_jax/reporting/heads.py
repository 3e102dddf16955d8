"""The page of one run's heads: whatever RUN/heads/ holds at the moment, in one file that needs nothing else."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath

from mha_jax.reporting import probes, roles
from mha_jax.reporting.canvas import Picture
from mha_jax.reporting.html import inline, template
from mha_jax.reporting.redundancy import signed
from mha_jax.sweeps.store import RunDirectory, read_json

# Files that start with this name, the title of their section, and what a reader learns and how it was computed.
_SECTIONS = (
    ("atlas", "The atlas",
     "Shows all heads at a glance, each with its map of one text in the colour of its role; atlas.html also has what "
     "each costs to cut, and its map with every token."),
    ("roles", "What each head does",
     "Shows heads that have specialised, and on what. Colours are the role of a head: where it looks (previous, next, "
     "same or first position, the rarest token, start and end tokens, punctuation, equal tokens before, what followed "
     "them), or else how (broad, far, narrow). Scores are means over held-out texts; a role needs a 95 % interval "
     "above its threshold and above what even attention would reach."),
    ("relations", "Which dependencies heads find",
     "Shows heads that know syntax: points to the right of the best fixed offset. Heads and offsets were chosen on "
     "other sentences than those that score them."),
    ("coreference", "Which heads find antecedents",
     "Shows heads by which a pronoun or a name looks back at who is meant; coreference.csv has every kind of mention."),
    ("maps", "Where heads look in a text",
     "maps.html shows the attention of every head in single texts, token by token, and what the heads of a layer do "
     "together; the folder maps has the same as pictures."),
    ("probes", "What can be read out of heads",
     "Shows which heads carry grammar in a form that a linear classifier can read. Probes see what a head reads before "
     "its output projection, the mean over a word's pieces; they are trained, chosen and scored on three files. "
     "Selectivity is the accuracy less that of a control task, random labels of word forms: what is left is not merely "
     "knowing the word."),
    ("importance", "What each head is worth",
     "Shows which heads the model leans on, and whether the measures agree. Rows are layers, columns heads, one panel "
     "a measure and kind of attention: means over batches of held-out data, with gates, norms or ablations of one head "
     "at a time. Where leave-one-out is marked, the loss without that head differs from the whole model's beyond "
     "chance, by a paired test adjusted for the number of heads."),
    ("curve", "How many heads can go",
     "Shows how far heads can be pruned after training before the metric gives way. Each line closes heads in one "
     "order, with gates at 0 and no further training; bands are intervals over seeds. An order is worth something "
     "where it keeps more than the controls, a random order and its own reverse."),
    ("alive", "Heads alive while the model trained",
     "Shows when heads went, and of which kind. At every evaluation those heads are counted whose gate is not "
     "exactly 0."),
    ("redundancy", "Which heads do the same",
     "Shows heads that could stand in for each other: dark squares off the diagonal. Every pair within a kind of "
     "attention is compared; heads (layer.number) stand in the order of the tree above, which joins them by average "
     "linkage; merges within the dotted cut are blue."),
    ("capture", "Tensors of heads", "Logits, weights and outputs of chosen heads in single texts, for numpy."),
)  # fmt: skip


class Section(NamedTuple):
    """One topic of the page: its pictures as inline SVG, its files, and tables of its JSON."""

    title: str
    text: str
    pictures: list[dict[str, str]]
    files: list[str]
    tables: list[dict[str, Any]]


def write_page(run_directory: epath.PathLike) -> epath.Path:
    """Writes RUN/heads/index.html from the pictures and JSON that lie beside it. Returns its path.

    May be called at any moment: what is not there has no section. Pictures that no section knows come last.
    Raises: UserError where the directory is no run's, or a file is damaged.
    """
    run = RunDirectory(run_directory)
    facts, directory = _facts(run), run.path / "heads"  # facts first: what is no run is refused before it is touched
    directory.mkdir(parents=True, exist_ok=True)
    report = run.workdir / "report" / "index.html"
    page = directory / "index.html"
    page.write_text(
        template("heads.html.jinja").render(
            run=run.run_id,
            facts=facts,
            sections=list(_sections(directory)),
            report="../../../report/index.html" if report.exists() else None,
        )
    )
    return page


def _facts(run: RunDirectory) -> list[tuple[str, str]]:
    config, status = run.config, run.status
    facts = [
        ("run", run.run_id),
        ("config", str(config.get("name"))),
        ("seeds", ", ".join(map(str, config.get("seeds", [])))),
        ("step", str(status.get("step", ""))),
        ("commit", str(status.get("commit") or "")),
        ("data", str((status.get("data") or {}).get("sha256", ""))),
    ]
    return [(name, text) for name, text in facts if text]


def _sections(directory: epath.Path) -> Iterator[Section]:
    names = sorted(path.name for path in directory.iterdir() if path.name != "index.html" and path.name[0] != ".")
    known = set()
    for stem, title, text in _SECTIONS:
        files = [name for name in names if name.startswith(stem)]
        known.update(files)
        if files:
            tables = list(_TABLES[stem](directory)) if stem in _TABLES and f"{stem}.json" in files else []
            yield Section(title, text, _pictures(directory, files, title), files, tables)
    files = [name for name in names if name not in known]
    if files:
        yield Section("Other results", "", _pictures(directory, files, "Other results"), files, [])


def _pictures(directory: epath.Path, files: list[str], title: str) -> list[dict[str, str]]:
    names = [name.removesuffix(".svg") for name in files if name.endswith(".svg")]
    pictures = [Picture(name, title, "", (directory / f"{name}.svg").read_text()) for name in names]
    return [{"name": picture.name, "svg": inline(picture)} for picture in pictures]


def _redundancy_tables(directory: epath.Path) -> Iterator[dict[str, Any]]:
    told = read_json(directory / "redundancy.json")
    yield {
        "caption": "The measures, each a distance here: 0 the same, 1 nothing in common.",
        "columns": ["measure", "meaning", "cut"],
        "rows": [[name, one["meaning"], f"{one['cut']:g}"] for name, one in told["measures"].items()],
    }
    where = "held-out batches" if told["held_out"] else "the same batches that found them"
    caption = (
        f"Twins by {told['found_by']}, the most alike first, and the loss in nats a target without the head less that "
        f"of the whole model, ± its standard error over {where}. Merged: the twin's gate also rises by the scale of "
        "the least squares fit."
    )
    if told["together"]:
        caption += (
            f" All suggested heads at once: {signed(told['together'])}; as many at random: {signed(told['random'])}."
        )
    yield {
        "caption": caption,
        "columns": ["head", "twin", "distance", "pruned", "merged", "suggestion"],
        "rows": [
            [one["head"], one["twin"], f"{one['distance']:.3f}", signed(one["pruned"]),
             signed(one["merged"]) if one["merged"] else "–", one["action"] if one["redundant"] else "beyond the cut"]
            for one in told["suggestions"]
        ],
    }  # fmt: skip
    models = [one for one in told["matchings"] if "/" not in one["between"][0]]
    if models:
        yield {
            "caption": "Heads matched one to one with those of another seed or run: mean similarity of the best "
            "pairing, of a random one (chance), and of the best one where similarities, but for each head's mean, "
            "stand at random places.",
            "columns": ["with", "kind", "measure", "matched", "chance", "shuffled", "p"],
            "rows": [
                [one["between"][1], one["kind"], one["measure"]]
                + [f"{one['matching'][part]:.3f}" for part in ("matched", "chance", "shuffled", "p_value")]
                for one in models
            ],
        }


_TABLES = {
    "probes": lambda directory: probes.tables(read_json(directory / "probes.json")),
    "redundancy": _redundancy_tables,
    "roles": lambda directory: roles.tables(read_json(directory / "roles.json")),
}
