"""What each head does: `python -m experiments.heads roles --run=DIR [--treebank=dev.conllu.gz]`.

Roles: where a head looks (previous, next, same, first, rare token, sink, separator, duplicate token, induction; aligned
for cross-attention) and how (broad, narrow, long), each with its 95 % interval over examples of a split and the chance
level of even attention; induction also on random tokens that repeat; the shapes of its maps. --positional is the share
from which on a head is previous, next, same or first: 0.9 (Voita et al. 2019), or 0.5, from which Clark et al. 2019
count heads.
With --treebank: for each dependency relation the best head against the best fixed offset, chosen on --treebank and
scored on --treebank_test (without it: chosen on every other sentence, scored on the rest).
With --coreference: how often a head finds antecedents, from CoNLL-U files with Entity= in MISC, or from lines
"sentence name, first word, last word, entity" (by tabs, words from 1) about the sentences of --treebank.

Writes RUN/heads/roles.{json,csv,svg,png}, relations.{csv,svg,png}, coreference.csv and the page RUN/heads/index.html;
the JSON is documented in mha_jax/reporting/roles.py.
"""

from typing import TYPE_CHECKING

from absl import flags

from experiments import cli
from mha_jax.specs import UserError

if TYPE_CHECKING:
    from mha_jax.data.conllu import Sentence
    from mha_jax.data.words import WordRows
    from mha_jax.heads.coreference import Antecedents, Text
    from mha_jax.heads.reading import TokenKinds
    from mha_jax.heads.relations import Relation
    from mha_jax.models.transformer import Model
    from mha_jax.sweeps.opening import OpenedRun

_DOCUMENT_PIECES = 128  # of a text for coreference at most (Clark et al. 2019, section 4.3)
_REPEATED_ROWS = 32


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("run", None, "Directory of a finished run.", flag_values=values)
    flags.DEFINE_integer("seed", None, "A seed of the run; default: all.", flag_values=values)
    flags.DEFINE_string("split", "validation", "Split whose texts are read.", flag_values=values)
    flags.DEFINE_integer("max_examples", 2000, "Examples, and sentences of each file, at most.", 1, flag_values=values)
    flags.DEFINE_float("positional", 0.9, "From which share on a role is positional.", 0, 1, flag_values=values)
    flags.DEFINE_string("treebank", None, "CoNLL-U file that chooses heads for relations.", flag_values=values)
    flags.DEFINE_string("treebank_test", None, "CoNLL-U file that scores them.", flag_values=values)
    flags.DEFINE_string("coreference", None, "CoNLL-U file with Entity=, or lines of mentions.", flag_values=values)
    cli.parse(values, argv, __doc__)
    if not values.run:
        raise UserError("--run is missing: the directory of a finished run, for instance runs/default/runs/NAME")
    if values.treebank_test and not values.treebank:
        raise UserError("--treebank_test scores what --treebank chooses: give both")
    if values.coreference and not _is_treebank(values.coreference) and not values.treebank:
        raise UserError(f"--coreference={values.coreference} names words of sentences: give those by --treebank")
    _study(values)
    return 0


def _is_treebank(path: str) -> bool:
    return path.removesuffix(".gz").endswith(".conllu")


def _study(values: flags.FlagValues) -> None:
    # matplotlib and JAX take seconds to import.
    from mha_jax.heads.reading import head_roles, repeated_tokens
    from mha_jax.heads.roles import Thresholds
    from mha_jax.reporting import formats
    from mha_jax.reporting import roles as reporting
    from mha_jax.reporting.heads import write_page
    from mha_jax.sweeps.opening import chosen_seeds, open_run
    from mha_jax.sweeps.store import write_json

    opened = open_run(values.run)
    seeds, kinds = chosen_seeds(opened, values.seed), _token_kinds(opened)
    sentences = _Sentences(opened, values)  # what is wrong with a file shows before anything is computed
    random = repeated_tokens(opened.run.task, kinds, _REPEATED_ROWS, sentences.length)
    found = {}
    for seed in seeds:
        model = opened.model(seed)
        heads = head_roles(model, opened.batches(values.split), kinds, random, values.max_examples)
        found[seed] = reporting.SeedFound(heads, sentences.relations(model), sentences.antecedents(model))

    facts = {"run": opened.directory.run_id, "step": opened.step, "split": values.split}
    facts |= {name: values[name].value for name in ("treebank", "treebank_test", "coreference")}
    told = reporting.record(found, Thresholds(positional=values.positional), facts | {"left_out": sentences.left_out})
    directory = opened.directory.path / "heads"
    write_json(directory / "roles.json", told)
    (directory / "roles.csv").write_text(formats.rows_as_csv(reporting.rows(told)))
    for part in ("relations", "coreference"):
        if rows := reporting.flat_rows(told, part):
            (directory / f"{part}.csv").write_text(formats.rows_as_csv(rows))
    reporting.draw(told, f"{opened.directory.run_id}  ·  step {opened.step}  ·  {values.split}", directory)
    for file, names in sentences.left_out.items():
        if names:
            print(f"{file}: {len(names)} sentences have more than {sentences.length} pieces and are left out: "
                  + ", ".join(names[:3]) + (", ..." if len(names) > 3 else ""))  # fmt: skip
    print("\n".join(formats.aligned(reporting.tables(told))))
    print(f"page: {write_page(opened.directory.path)}")


def _token_kinds(opened: "OpenedRun") -> "dict[str, TokenKinds]":
    """Of the tokens that each stack reads."""
    from mha_jax.heads.reading import TokenKinds

    task, data = opened.run.task, opened.data
    fields = {"encoder": "source", "decoder": "target"}
    if task != "translation":
        fields = {"decoder" if task == "lm" else "encoder": "text"}
    return {stack: TokenKinds.of(data.tokenizer, data.token_counts(field)) for stack, field in fields.items()}


class _Sentences:
    """The sentences of the files that were given, cut into pieces once for all seeds."""

    def __init__(self, opened: "OpenedRun", values: flags.FlagValues):
        from mha_jax.data import conllu
        from mha_jax.data.words import word_rows
        from mha_jax.heads.coreference import from_table
        from mha_jax.heads.treebank_maps import text_rows

        self.length = min(opened.run.data.length, opened.run.model.max_length)
        self.left_out: dict[str, list[str]] = {}
        self._treebanks: list[WordRows] = []
        self._texts: tuple[list[Text], WordRows] | None = None
        task, tokenizer, limit = opened.run.task, opened.data.tokenizer, values.max_examples
        first: list[Sentence] = []
        for path in (values.treebank, values.treebank_test):
            if path:
                sentences = conllu.read(path, limit)
                first = first or sentences
                self._treebanks.append(word_rows(sentences, tokenizer, task, self.length))
                self.left_out[path] = list(self._treebanks[-1].left_out)
        if path := values.coreference:
            whole = _is_treebank(path)
            sentences, mentions = (conllu.read(path, limit), None) if whole else (first, from_table(path, first))
            length = min(self.length, _DOCUMENT_PIECES)
            self._texts = text_rows(sentences, tokenizer, task, length, mentions)
            self.left_out[path] = list(self._texts[1].left_out)

    def relations(self, model: "Model") -> "list[Relation]":
        from mha_jax.heads.relations import arcs, best_heads, halves
        from mha_jax.heads.treebank_maps import word_maps

        if not self._treebanks:
            return []
        found = [arcs(word_maps(model, rows)) for rows in self._treebanks]
        chosen_on, scored_on = found if len(found) == 2 else halves(found[0])
        return best_heads(chosen_on, scored_on)

    def antecedents(self, model: "Model") -> "list[Antecedents]":
        from mha_jax.heads.coreference import asked, best_antecedents
        from mha_jax.heads.treebank_maps import text_maps

        return best_antecedents(asked(text_maps(model, *self._texts))) if self._texts else []
