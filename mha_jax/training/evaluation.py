"""Evaluation on whole splits: loss, perplexity, bits per byte, accuracy, and BLEU by beam search; each (R,)."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mha_jax.data import Data
from mha_jax.heads import gating
from mha_jax.models.decoding import translate
from mha_jax.models.losses import Batch
from mha_jax.specs import RunSpec
from mha_jax.training import hosts
from mha_jax.training.metrics import bleu, perplexity
from mha_jax.training.parallel import JitProgram
from mha_jax.training.step import merge, over_seeds


def evaluate(program: JitProgram, params: Any, constants: Any, data: Data, split: str) -> dict[str, np.ndarray]:
    """Mean loss (nats a target) over the whole split, with what follows from it. Padding weighs nothing."""
    run = program.run
    totals: dict[str, np.ndarray] = {}
    for batch in data.eval_batches(split):
        batch = {name: leaf for name, leaf in batch.items() if name != "index"}
        sums = jax.device_get(program.evaluate(params, constants, batch))
        # Float64 on the host: a split of millions of tokens would lose digits in float32.
        totals = {name: totals.get(name, 0.0) + np.asarray(value, np.float64) for name, value in sums.items()}
    loss = totals["loss"] / totals["weight"]
    result = {"loss": loss, "accuracy": totals["correct"] / totals["weight"]}
    # What is observed of heads goes by the name of their attention; batches count by their weight.
    result |= {name: value / totals["weight"] for name, value in totals.items() if "/" in name}
    if run.task != "classification":
        result["perplexity"] = perplexity(loss)
    if run.task == "lm":
        result["bits_per_byte"] = totals["loss"] / math.log(2) / data.num_bytes(split)
    return result


def translations(program: JitProgram, params: Any, constants: Any, data: Data, split: str) -> list[list[str]]:
    """The split translated by every seed's model with beam search: R lists of sentences in the split's order."""
    run, decoding = program.run, program.run.decoding

    def one(params: Any, constants: Any, batch: Batch) -> jax.Array:
        tokens, _ = translate(
            merge(run, params, constants),
            batch["source"],
            batch["lengths"],
            max_length=run.data.length,
            beam_size=decoding.beam_size,
            length_penalty=decoding.length_penalty,
        )
        return tokens

    def all_seeds(params: Any, constants: Any, batch: Batch) -> jax.Array:
        return over_seeds(run, lambda params, constants: one(params, constants, batch))(params, constants)

    search = program.reading(all_seeds)
    total = len(data.references(split))
    wanted = min(total, decoding.max_sentences or total)
    outputs: list[list[str]] = [[""] * wanted for _ in range(jax.tree.leaves(params)[0].shape[0])]
    for source, lengths, index in _decoding_batches(run, data, split, wanted):
        batch = program.spread({"source": source, "lengths": lengths})
        tokens = np.asarray(
            program.compiled_for("translate", search, params, constants, batch)(params, constants, batch)
        )
        hosts.beat()
        for seed, seed_tokens in enumerate(tokens):
            for row, position in enumerate(index):
                if position >= 0:
                    outputs[seed][position] = data.tokenizer.decode(seed_tokens[row])
    return outputs


def _decoding_batches(
    run: RunSpec, data: Data, split: str, wanted: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Sources of one static shape, shortest first, so that a batch ends when its like-sized sentences end."""
    rows = [
        (int(batch["source_lengths"][i]), int(position), batch["source"][i])
        for batch in data.eval_batches(split)
        for i, position in enumerate(batch["index"])
        if 0 <= position < wanted
    ]
    rows.sort(key=lambda row: row[:2])
    size, length = run.decoding.batch_size, run.data.length
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        source = np.zeros((size, length), np.int32)
        lengths, index = np.ones(size, np.int32), np.full(size, -1, np.int32)
        for i, (row_length, position, tokens) in enumerate(part):
            source[i, : len(tokens)], lengths[i], index[i] = tokens, row_length, position
        yield source, lengths, index


def evaluate_bleu(
    program: JitProgram, params: Any, constants: Any, data: Data, split: str
) -> tuple[dict[str, np.ndarray], str, list[list[str]]]:
    """Corpus BLEU of every seed on a split, sacreBLEU's signature, and the sentences."""
    sentences = translations(program, params, constants, data, split)
    references = data.references(split)[: len(sentences[0])]
    scored = [bleu(hypotheses, references) for hypotheses in sentences]
    return {"bleu": np.asarray([score for score, _ in scored])}, scored[0][1], sentences


def count_heads(run: RunSpec, params: Any, constants: Any) -> dict[str, np.ndarray]:
    """Heads whose gate is not 0, (R,): "heads_alive", "heads_alive/encoder", ...; {} where none can be pruned."""
    if not run.gates.prunes:
        return {}
    counts = jax.vmap(lambda *trees: gating.heads_alive(merge(run, *trees)))(params, constants)
    return {name: np.asarray(count) for name, count in hosts.on_host(counts).items()}


def seed_gates(run: RunSpec, params: Any, constants: Any) -> dict[str, dict[str, list[float]]]:
    """{seed: {attention: the factor of each head in evaluation}}, as gates.json holds it."""
    gates = hosts.on_host(jax.vmap(lambda *trees: gating.head_gates(merge(run, *trees)))(params, constants))
    return {
        str(seed): {name: np.asarray(gate_RH)[index].tolist() for name, gate_RH in gates.items()}
        for index, seed in enumerate(run.seeds)
    }


def average(trees: list[Any]) -> Any:
    """The mean of several checkpoints' parameters, leaf by leaf."""
    return jax.tree.map(lambda *leaves: functools.reduce(lambda a, b: a + b, leaves) / len(leaves), *trees)
