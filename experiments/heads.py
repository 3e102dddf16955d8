"""Looks into the heads of a trained run: `python -m experiments.heads VERB --run=DIR/runs/NAME`.

Each verb writes JSON, tables and pictures under RUN/heads/ and prints what it found; `VERB --help` lists its flags.
"""

import importlib
import sys

from experiments import cli
from mha_jax.specs import UserError

# A verb is a module of experiments/verbs; only the one asked for is imported.
VERBS = {
    "importance": "what each head is worth: norms, gradients, ablations, Shapley values",
    "prune": "removes heads into a new, smaller run",
    "curve": "the metric against heads left, by several orders with controls",
    "grow": "splits, merges, groups or adds heads, into a new run",
    "redundancy": "which heads do the same, in a layer, between layers, seeds and runs",
    "probe": "what linear probes read out of each head: part of speech, relation, number, tense",
    "roles": "where each head looks, its syntax and coreference, with chance levels",
    "atlas": "layers by heads on one page: role, worth, entropy and map of each",
    "table": "interpretability beside quality, over the cells of a sweep",
    "all": "several verbs over all runs of a sweep",
    "claims": "what a paper says about heads, held or not",
    "capture": "named tensors of chosen heads, as arrays for numpy",
    "maps": "attention maps of single texts: a page, and pictures for a paper",
    "import": "turns a checkpoint of another library into a run",
    "export": "writes a run's model as a checkpoint of another library",
}


def main(argv: list[str]) -> int:
    verb = argv[1] if len(argv) > 1 else "--help"
    if verb in ("--help", "-h", "help"):
        print(__doc__)
        print("\n".join(f"  {name:12} {about}" for name, about in VERBS.items()))
        return 0
    if verb not in VERBS:
        raise UserError(f"unknown verb {verb!r}; known are {', '.join(VERBS)}")
    module = importlib.import_module("experiments.verbs." + ("import_" if verb == "import" else verb))
    return module.main([f"{argv[0]} {verb}", *argv[2:]])


if __name__ == "__main__":
    sys.argv[0] = "experiments.heads"
    cli.run(main)
