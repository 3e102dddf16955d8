"""Clark et al. 2019, "What Does BERT Look At?": single heads held against the dependencies of a treebank.

Question:    do single heads of a masked language model find syntactic relations, and does one of them parse?
Scientific:  nothing varies in training; `experiments.heads roles` and `probe` look into the trained model.
Nuisance:    the seed: three models, each with best heads of its own.
Fixed:       everything of training.
Decides:     accuracy of a relation's best head, chosen on some sentences and scored on others, beside the best offset.

  --config=configs/clark2019.py:small   2 layers of 8 heads on English captions and web text: `masked` of
                                        configs/roles.py, which says where the text comes from. About 5 minutes on two
                                        CPU cores.
  --config=configs/clark2019.py:paper   The shape of BERT-base, which the paper did not train but took: 12 layers of 12
                                        heads, d_model 768. Days on an accelerator, with a text of your own.

After the small one, R being its run and T the treebank (Universal Dependencies, English Web Treebank):

  python -m experiments.heads roles --run=R --treebank=T/en_ewt-ud-dev.conllu.gz \\
             --treebank_test=T/en_ewt-ud-test.conllu.gz
  python -m experiments.heads probe --run=R --graph --tasks=pos --treebank=T/en_ewt-ud-train.conllu.gz \\
             --treebank_dev=T/en_ewt-ud-dev.conllu.gz --treebank_test=T/en_ewt-ud-test.conllu.gz
  python -m experiments.heads claims --run=R --config=configs/clark2019.py:small

The weights of BERT are not among what this study can bring. With a checkpoint of your own, made a run by
`python -m experiments.heads import`, the same commands look into that run (:paper). It is one seed: the claims stay
undecided, and the relation table has the numbers, with intervals over sentences.

The paper's treebank (Penn Treebank, Stanford Dependencies) is not free; Universal Dependencies name relations by other
words and turn prepositions round, so only relations are claimed that both have. One claim of the paper is not checked
here: that random weights do not parse (PARSERS), which takes a second run, untrained (training.steps=1).
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import roles
from mha_jax.specs import UserError


def get_config(profile: str = "small") -> ConfigDict:
    if profile not in ("", "small", "paper"):
        raise UserError(f"unknown profile {profile!r} of configs/clark2019.py; known are 'small' and 'paper'")
    config = roles.get_config("masked").unlock()
    config.name = f"clark2019-{profile or 'small'}"
    config.model.num_heads = 8
    if profile == "paper":
        config.model.update(num_layers=12, d_model=768, num_heads=12, d_ff=3072, max_length=512)
        config.data.update(vocab_size=30000, length=512, batch_size=256)
        config.optimizer.update(learning_rate=1e-4, warmup_steps=10_000)
        config.training.update(steps=1_000_000, eval_every=10_000, checkpoint_every=10_000, log_every=100)
    return config.lock()


def get_sweep(profile: str = "small") -> Iterator[dict[str, Any]]:
    yield {}


PAPER = {
    "source": "Clark et al. 2019 (arXiv:1906.04341), BERT-base, Wall Street Journal: relations, none of them a loss",
    "confidence": "verified",
    "rows": [],
}
# Table 1, in percent: best head (layer-number, from 1), its accuracy, the best offset's, and that offset.
RELATIONS = {
    "All": ("7-6", 34.5, 26.3, 1),
    "prep": ("7-4", 66.7, 61.8, -1),
    "pobj": ("9-6", 76.3, 34.6, -2),
    "det": ("8-11", 94.3, 51.7, 1),
    "nn": ("4-10", 70.4, 70.2, 1),
    "nsubj": ("8-2", 58.5, 45.5, 1),
    "amod": ("4-10", 75.6, 68.3, 1),
    "dobj": ("8-10", 86.8, 40.0, -2),
    "advmod": ("7-6", 48.8, 40.2, 1),
    "aux": ("4-10", 81.1, 71.5, 1),
    "poss": ("7-6", 80.5, 47.7, 1),
    "auxpass": ("4-10", 82.5, 40.5, 1),
    "ccomp": ("8-1", 48.8, 12.4, -2),
    "mark": ("8-2", 50.7, 14.5, 2),
    "prt": ("6-7", 99.1, 91.4, -1),
}
# Table 3: unlabelled attachment score of parsers made of all attention maps, in percent.
PARSERS = {
    "right-branching": 26,
    "distances and GloVe": 58,
    "random weights and GloVe": 30,
    "attention": 61,
    "attention and GloVe": 77,
}
# What a relation of table 1 is called in Universal Dependencies.
_UNIVERSAL = {"All": "All", "det": "det", "nsubj": "nsubj", "dobj": "obj", "advmod": "advmod", "mark": "mark"}


def get_cuts(profile: str = "small") -> list[dict[str, Any]]:
    """What the paper says about heads, for `experiments.heads claims`, from roles.json and probes.json of a treebank.

    The margin of a relation is half of what the paper's head is above its offset; that of the mix of all maps half of
    what it is above the other parser in the paper.
    """
    claims: list[dict[str, Any]] = [
        {
            "text": "No single head parses: the best finds the heads of fewer than half of the words (paper: 34.5 %).",
            "less": {"relation": "All", "part": "accuracy"},
            "than": {"value": 0.5},
        }
    ]
    for name, universal in _UNIVERSAL.items():
        _, accuracy, baseline, _ = RELATIONS[name]
        claims.append(
            {
                "text": f"{name}: one head is above the best offset, by half as much as in the paper at least "
                f"({accuracy:g} % and {baseline:g} %).",
                "less": {"relation": universal, "part": "baseline"},
                "than": {"relation": universal, "part": "accuracy"},
                "margin": (accuracy - baseline) / 200,
            }
        )
    mix = PARSERS["attention"]
    others = {"best_head": ("the best head", RELATIONS["All"][1]),
              "right_branching": ("right-branching", PARSERS["right-branching"])}  # fmt: skip
    for part, (name, score) in others.items():
        claims.append(
            {
                "text": f"A linear mix of all maps parses far better than {name} (paper: {mix:g} and {score:g} %).",
                "less": {"graph": part},
                "than": {"graph": "probe"},
                "margin": (mix - score) / 200,
            }
        )
    return claims
