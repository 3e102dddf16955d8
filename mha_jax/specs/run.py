"""A whole run: its sections, and what must hold between them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from mha_jax.specs.checks import UserError, at_least, choice, divisors, listing
from mha_jax.specs.data import FILE_TOKENIZERS, DataSpec
from mha_jax.specs.gates import GatesSpec
from mha_jax.specs.model import ModelSpec
from mha_jax.specs.training import DecodingSpec, OptimizerSpec, TrainingSpec

ATTENTION_KINDS = {
    "lm": ("decoder",),
    "masked_lm": ("encoder",),
    "classification": ("encoder",),
    "translation": ("encoder", "decoder", "cross"),
}


LARGEST_SEED = 2**31 - 1  # keys are made of 32-bit integers


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """Devices along each axis for parallel="jit"; `data` None takes all that remain."""

    seed: int = 1
    data: int | None = None
    head: int = 1

    def __post_init__(self) -> None:
        for field in ("seed", "head"):
            at_least(f"mesh.{field}", getattr(self, field), 1)
        if self.data is not None:
            at_least("mesh.data", self.data, 1)

    def sizes(self, num_devices: int) -> tuple[int, int, int]:
        """Axis sizes (seed, data, head) on so many devices."""
        fixed = self.seed * self.head
        data = self.data if self.data is not None else max(num_devices // fixed, 1)
        if fixed * data > num_devices:
            raise UserError(
                f"mesh seed={self.seed} x data={data} x head={self.head} needs {fixed * data} devices; "
                f"there are {num_devices}"
            )
        return self.seed, data, self.head


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """Everything that decides a run's result."""

    name: str
    task: Literal["lm", "masked_lm", "translation", "classification"]
    seeds: tuple[int, ...]
    parallel: Literal["jit", "pmap"]
    mesh: MeshSpec
    model: ModelSpec
    data: DataSpec
    optimizer: OptimizerSpec
    training: TrainingSpec
    decoding: DecodingSpec
    gates: GatesSpec = GatesSpec()  # noqa: RUF009 (specs are frozen)
    # The run, seed and step whose state this one was cut out of, and how; its training starts from a checkpoint only.
    parent: Mapping[str, Any] | None = None
    # How many members (runs times seeds) a sweep may train together in one program; "auto": sweeps/packing.py decides.
    pack: int | str = "auto"

    def __post_init__(self) -> None:
        choice("task", self.task, tuple(ATTENTION_KINDS))
        choice("parallel", self.parallel, ("jit", "pmap"))
        if self.pack != "auto" and not (str(self.pack).isdecimal() and int(self.pack) >= 1):  # a flag gives text
            raise UserError(f"pack={self.pack!r} must be 'auto' or an integer of at least 1")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"seeds={self.seeds!r} must be distinct integers, at least one")
        if not all(isinstance(seed, int) and 0 <= seed <= LARGEST_SEED for seed in self.seeds):
            raise UserError(f"seeds={self.seeds!r} must be integers from 0 to {LARGEST_SEED}")
        for kind in ATTENTION_KINDS[self.task]:
            self.model.heads(kind)
        if self.model.adaptive_span.max_span is not None and "cross" in ATTENTION_KINDS[self.task]:
            raise UserError(
                f"model.adaptive_span.max_span={self.model.adaptive_span.max_span} needs distances in one sequence; "
                f"task={self.task!r} has cross-attention, where there are none: leave it None"
            )
        if self.data.length > self.model.max_length:
            raise UserError(
                f"data.length={self.data.length} is longer than model.max_length={self.model.max_length} positions"
            )
        if self.task == "masked_lm":
            at_least("data.length", self.data.length, 3)  # a start, a token and an end
        if self.task == "translation" and self.data.source not in ("parallel", "tfds"):
            raise UserError(f"task='translation' needs data.source='parallel' or 'tfds', not {self.data.source!r}")
        if self.task == "translation" and self.data.tokenizer in FILE_TOKENIZERS:
            raise UserError(
                f"task='translation' needs data.tokenizer='bytes' or 'bpe', not {self.data.tokenizer!r}: "
                "it writes their start and end tokens"
            )
        if self.data.tokenizer == "llama2c" and self.task != "lm":
            raise UserError(f"data.tokenizer='llama2c' is for task='lm', not {self.task!r}: its texts have no EOS")
        if self.task == "classification" and not self.data.num_classes:
            raise UserError("task='classification' needs data.num_classes")
        if self.model.pooling == "first" and self.task != "classification":
            raise UserError(f"model.pooling='first' is for task='classification', not {self.task!r}")
        if self.model.token_types and self.task not in ("masked_lm", "classification"):
            raise UserError(
                f"model.token_types={self.model.token_types} is for task='masked_lm' or 'classification', "
                f"not {self.task!r}"
            )
        if not self.model.tied_output and self.task != "lm":
            raise UserError(f"model.tied_output=False is for task='lm', not {self.task!r}")
        if self.parallel == "pmap" and (self.mesh.seed, self.mesh.head) != (1, 1):
            raise UserError(
                f"parallel='pmap' splits data only; mesh.seed={self.mesh.seed} and "
                f"mesh.head={self.mesh.head} need 'jit'"
            )
        if len(self.seeds) % self.mesh.seed:
            raise UserError(f"{len(self.seeds)} seeds do not split over mesh.seed={self.mesh.seed} devices")
        self._check_gates()
        self._check_frozen()

    @property
    def gated_kinds(self) -> tuple[str, ...]:
        """The kinds of attention that `gates` acts on."""
        return ATTENTION_KINDS[self.task] if self.gates.where is None else self.gates.where

    @property
    def gated_heads(self) -> int:
        """How many heads those have."""
        return sum(shape.num_heads for kind in self.gated_kinds for shape in self.model.heads(kind))

    @property
    def prune_end(self) -> int:
        """The step after which no more heads are pruned."""
        return self.training.steps if self.gates.prune_end is None else self.gates.prune_end

    def _check_frozen(self) -> None:
        parts = ("tokens", *(kind for kind in ATTENTION_KINDS[self.task] if kind != "cross"))
        for part in self.training.freeze or ():
            if part not in parts:
                raise UserError(f"training.freeze names {part!r}; task={self.task!r} has {', '.join(map(repr, parts))}")
        # A masked language model's head and a classifier's are of neither part.
        if self.task in ("lm", "translation") and set(self.training.freeze or ()) == set(parts):
            raise UserError(f"training.freeze={self.training.freeze!r} leaves nothing to train")

    def _check_gates(self) -> None:
        kinds = ATTENTION_KINDS[self.task]
        for kind in self.gated_kinds:
            if kind not in kinds:
                raise UserError(f"gates.where names {kind!r}; task={self.task!r} has {', '.join(map(repr, kinds))}")
        if isinstance(self.gates.l0_weight, Mapping) and set(self.gates.l0_weight) != set(self.gated_kinds):
            raise UserError(
                f"gates.l0_weight has entries for {', '.join(map(repr, self.gates.l0_weight))}; it needs one each for "
                f"{', '.join(map(repr, self.gated_kinds))}"
            )
        if self.gates.prune_to is not None:
            self.gates.heads_left(self.gated_heads)
            if not self.gates.prune_start < self.prune_end <= self.training.steps:
                raise UserError(
                    f"gates.prune_start={self.gates.prune_start} and prune_end={self.prune_end} must rise within "
                    f"training.steps={self.training.steps}"
                )

    def check_devices(self, num_devices: int) -> None:
        """Raises UserError where batch or heads do not divide over the devices of the machine at hand."""
        _, data, head = self.mesh.sizes(num_devices)
        if self.data.batch_tokens is None and self.data.batch_size % data:
            fits = [d for d in divisors(self.data.batch_size) if d <= num_devices]
            raise UserError(
                f"data.batch_size={self.data.batch_size} is not a multiple of {data} data devices; {listing(fits)} fit"
            )
        for kind in ATTENTION_KINDS[self.task]:
            for shape in self.model.heads(kind):
                common = math.gcd(shape.num_heads, shape.num_kv_heads)
                if common % head:
                    raise UserError(
                        f"mesh.head={head} does not divide num_heads={shape.num_heads} and "
                        f"num_kv_heads={shape.num_kv_heads}; {listing(divisors(common))} fit"
                    )
