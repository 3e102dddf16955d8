"""What a run is made of: frozen, validated values, one dataclass a section of the config.

Building a spec checks everything that can be checked without data or devices, and touches neither. Every fault is a
`UserError`: one line that says what is wrong, the value, and what would be right.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

HeadCount = int | tuple[int, ...] | Mapping[str, Any]
ATTENTION_KINDS = {
    "lm": ("decoder",),
    "classification": ("encoder",),
    "translation": ("encoder", "decoder", "cross"),
}


class UserError(ValueError):
    """What the user gave is wrong. Scripts print the message as one line and exit with 2."""


def _choice(field: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{field}={value!r} is not one of {', '.join(map(repr, allowed))}")


def _at_least(field: str, value: Any, least: int | float, kinds: tuple[type, ...] = (int,)) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds) or not value >= least:
        wanted = "an integer" if kinds == (int,) else "a number"
        raise UserError(f"{field}={value!r} must be {wanted} of at least {least}")


def _rate(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise UserError(f"{field}={value!r} must be at least 0 and below 1")


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _listing(values: list[int]) -> str:
    words = [str(v) for v in values]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


@dataclasses.dataclass(frozen=True)
class HeadShape:
    """The heads of one attention layer: H query heads over G key/value heads, K and V wide."""

    num_heads: int
    num_kv_heads: int
    qk_dim: int
    v_dim: int
    head_to_group: tuple[int, ...] | None = None

    @classmethod
    def resolve(
        cls,
        d_model: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        head_to_group: tuple[int, ...] | None = None,
    ) -> "HeadShape":
        """Fills in what is left out: G = H, and d_model / H for each width that is not given.

        Raises: UserError for a width that must be derived where H does not divide d_model (with the head counts
        that fit), G that does not divide H without a map, a map that does not fit, dimensions that are not positive.
        """
        _at_least("d_model", d_model, 1)
        _at_least("num_heads", num_heads, 0)
        groups = num_heads if num_kv_heads is None else num_kv_heads
        _at_least("num_kv_heads", groups, 1 if num_heads else 0)
        for field, width in (("qk_dim", qk_dim), ("v_dim", v_dim)):
            if width is not None:
                _at_least(field, width, 1)
            elif num_heads and d_model % num_heads:
                raise UserError(
                    f"d_model={d_model} is not a multiple of num_heads={num_heads}; "
                    f"{_listing(_divisors(d_model))} fit, or give qk_dim and v_dim"
                )
        derived = d_model // max(num_heads, 1)
        shape = cls(num_heads, groups, qk_dim or derived, v_dim or derived, head_to_group)
        shape._check_groups()
        return shape

    def _check_groups(self) -> None:
        if self.head_to_group is None:
            if self.num_heads and self.num_heads % self.num_kv_heads:
                raise UserError(
                    f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                    f"{_listing(_divisors(self.num_heads))} fit, or give head_to_group"
                )
            return
        if len(self.head_to_group) != self.num_heads:
            raise UserError(
                f"head_to_group has {len(self.head_to_group)} entries; num_heads={self.num_heads} needs one a head"
            )
        outside = [g for g in self.head_to_group if not 0 <= g < self.num_kv_heads]
        if outside:
            raise UserError(
                f"head_to_group names group {outside[0]}; num_kv_heads={self.num_kv_heads} has groups "
                f"0 to {self.num_kv_heads - 1}"
            )

    @property
    def groups(self) -> tuple[int, ...]:
        """The group that each head reads."""
        if self.head_to_group is not None:
            return self.head_to_group
        per_group = self.num_heads // self.num_kv_heads if self.num_heads else 1
        return tuple(h // per_group for h in range(self.num_heads))


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A stack of Transformer blocks.

    `num_heads`, `num_kv_heads`, `qk_dim` and `v_dim` are each one value, a tuple with one a layer, or a dict by kind of
    attention ("encoder", "decoder", "cross") whose values are either. Widths are per head; None derives d_model / H.
    """

    num_layers: int
    d_model: int
    num_heads: HeadCount
    d_ff: int
    max_length: int
    num_kv_heads: HeadCount | None = None
    qk_dim: HeadCount | None = None
    v_dim: HeadCount | None = None
    head_to_group: tuple[int, ...] | None = None
    positions: Literal["sinusoidal", "learned", "rope", "none"] = "learned"
    norm: Literal["pre", "post"] = "pre"
    activation: Literal["relu", "gelu"] = "gelu"
    use_bias: bool = False
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    match: Literal["none", "params", "flops"] = "none"
    match_base: Mapping[str, Any] | None = None
    init: Literal["independent", "shared"] = "independent"
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    backend: str = "auto"

    def __post_init__(self) -> None:
        for field in ("num_layers", "d_model", "d_ff", "max_length"):
            _at_least(f"model.{field}", getattr(self, field), 1)
        _choice("model.positions", self.positions, ("sinusoidal", "learned", "rope", "none"))
        _choice("model.norm", self.norm, ("pre", "post"))
        _choice("model.activation", self.activation, ("relu", "gelu"))
        _choice("model.match", self.match, ("none", "params", "flops"))
        _choice("model.init", self.init, ("independent", "shared"))
        _choice("model.dtype", self.dtype, ("float32", "bfloat16", "float64"))
        _rate("model.dropout_rate", self.dropout_rate)
        _rate("model.attention_dropout_rate", self.attention_dropout_rate)
        if self.match != "none" and self.match_base is None:
            raise UserError(
                f"model.match={self.match!r} needs model.match_base, the head shape whose cost every cell shall have"
            )

    def heads(self, kind: str) -> tuple[HeadShape, ...]:
        """The head shape of each layer for one kind of attention: "encoder", "decoder" or "cross"."""
        shapes = []
        for layer in range(self.num_layers):
            fields = [
                self._of_layer(name, kind, layer) for name in ("num_heads", "num_kv_heads", "qk_dim", "v_dim")
            ]
            try:
                shape = HeadShape.resolve(self.d_model, *fields, head_to_group=self.head_to_group)
            except UserError as error:
                raise UserError(f"{error} (model, {kind} layer {layer})") from None
            if self.positions == "rope" and kind != "cross" and shape.num_heads and shape.qk_dim % 2:
                raise UserError(f"model.positions='rope' rotates pairs: qk_dim={shape.qk_dim} must be even")
            if self.init == "shared":
                self._check_shared(shape)
            shapes.append(shape)
        return tuple(shapes)

    def _check_shared(self, shape: HeadShape) -> None:
        for heads, width in ((shape.num_heads, shape.qk_dim), (shape.num_heads, shape.v_dim)):
            if heads * width > self.d_model:
                raise UserError(
                    f"model.init='shared' cuts heads out of one [{self.d_model}, {self.d_model}] draw: "
                    f"{heads} heads of width {width} need {heads * width} columns, at most {self.d_model} fit"
                )

    def _of_layer(self, field: str, kind: str, layer: int) -> int | None:
        value: Any = getattr(self, field)
        if isinstance(value, Mapping):
            if kind not in value:
                raise UserError(f"model.{field} has no entry for {kind!r}; it has {', '.join(map(repr, value))}")
            value = value[kind]
        if isinstance(value, (tuple, list)):
            if len(value) != self.num_layers:
                raise UserError(
                    f"model.{field} lists {len(value)} layers for {kind!r}; model.num_layers={self.num_layers}"
                )
            value = value[layer]
        return value


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """Where tokens come from, and the static shapes that they are packed into."""

    source: Literal["embedded", "text", "parallel", "tfds"]
    length: int
    batch_size: int
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    vocab_size: int | None = None
    files: Mapping[str, Any] | None = None
    tfds_name: str | None = None
    languages: tuple[str, str] | None = None  # source and target; None: the order that the TFDS set itself gives
    validation_fraction: float = 0.05
    segments: bool = False
    batch_tokens: int | None = None
    buckets: tuple[int, ...] | None = None
    num_classes: int | None = None
    max_examples: int | None = None
    data_dir: str | None = None

    def __post_init__(self) -> None:
        _choice("data.source", self.source, ("embedded", "text", "parallel", "tfds"))
        _choice("data.tokenizer", self.tokenizer, ("bytes", "bpe"))
        _at_least("data.length", self.length, 2)
        _at_least("data.batch_size", self.batch_size, 1)
        if self.tokenizer == "bpe":
            _at_least("data.vocab_size", self.vocab_size, BYTE_VOCAB_SIZE)
        elif self.vocab_size not in (None, BYTE_VOCAB_SIZE):
            raise UserError(
                f"data.vocab_size={self.vocab_size} does not fit data.tokenizer='bytes', "
                f"which has {BYTE_VOCAB_SIZE}; leave it out or use 'bpe'"
            )
        if self.source in ("text", "parallel") and not (self.files and self.files.get("train")):
            raise UserError(f"data.source={self.source!r} needs data.files.train")
        if self.source == "tfds" and not self.tfds_name:
            raise UserError("data.source='tfds' needs data.tfds_name, for instance 'wmt14_translate/de-en'")
        for bucket in self.buckets or ():
            _at_least("data.buckets", bucket, 2)
        if self.buckets and (list(self.buckets) != sorted(set(self.buckets)) or self.buckets[-1] != self.length):
            raise UserError(f"data.buckets={self.buckets} must rise and end at data.length={self.length}")

    @property
    def tokens(self) -> int:
        """Size of the vocabulary, the special tokens included."""
        return BYTE_VOCAB_SIZE if self.vocab_size is None else self.vocab_size


PAD, BOS, EOS, MASK = 0, 1, 2, 3
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<mask>")
BYTE_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """AdamW or Adam with a schedule. For "vaswani", `learning_rate` multiplies the paper's rate (section 5.3)."""

    name: Literal["adamw", "adam"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "vaswani", "constant"] = "cosine"
    warmup_steps: int = 100
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-9
    weight_decay: float = 0.0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        _choice("optimizer.name", self.name, ("adamw", "adam"))
        _choice("optimizer.schedule", self.schedule, ("cosine", "vaswani", "constant"))
        _at_least("optimizer.warmup_steps", self.warmup_steps, 1 if self.schedule == "vaswani" else 0)
        if not self.learning_rate > 0:
            raise UserError(f"optimizer.learning_rate={self.learning_rate!r} must be positive")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(f"optimizer.clip_norm={self.clip_norm!r} must be positive, or None for no clipping")
        if self.name == "adam" and self.weight_decay:
            raise UserError(f"optimizer.weight_decay={self.weight_decay} needs optimizer.name='adamw'")
        for field in ("beta1", "beta2", "final_fraction", "weight_decay"):
            if not 0 <= getattr(self, field) <= 1:
                raise UserError(f"optimizer.{field}={getattr(self, field)!r} must be between 0 and 1")


@dataclasses.dataclass(frozen=True)
class TrainingSpec:
    """How long, how often, what is kept. `average_last` checkpoints are averaged for the final evaluation."""

    steps: int
    eval_every: int
    checkpoint_every: int
    log_every: int = 10
    keep_last: int = 2
    average_last: int = 1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for field in ("steps", "eval_every", "checkpoint_every", "log_every", "keep_last", "average_last"):
            _at_least(f"training.{field}", getattr(self, field), 1)
        _rate("training.label_smoothing", self.label_smoothing)
        if self.average_last > self.keep_last:
            raise UserError(
                f"training.average_last={self.average_last} averages more checkpoints than "
                f"training.keep_last={self.keep_last} keeps"
            )


@dataclasses.dataclass(frozen=True)
class DecodingSpec:
    """Beam search for translation. `length_penalty` is GNMT's alpha (Wu et al. 2016, eq. 14)."""

    beam_size: int = 4
    length_penalty: float = 0.6
    batch_size: int = 64
    max_sentences: int | None = None

    def __post_init__(self) -> None:
        _at_least("decoding.beam_size", self.beam_size, 1)
        _at_least("decoding.batch_size", self.batch_size, 1)
        if not self.length_penalty >= 0:
            raise UserError(f"decoding.length_penalty={self.length_penalty!r} must not be negative")


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """Devices along each axis for parallel="jit"; `data` None takes all that remain."""

    seed: int = 1
    data: int | None = None
    head: int = 1

    def __post_init__(self) -> None:
        for field in ("seed", "head"):
            _at_least(f"mesh.{field}", getattr(self, field), 1)
        if self.data is not None:
            _at_least("mesh.data", self.data, 1)

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
    task: Literal["lm", "translation", "classification"]
    seeds: tuple[int, ...]
    parallel: Literal["jit", "pmap"]
    mesh: MeshSpec
    model: ModelSpec
    data: DataSpec
    optimizer: OptimizerSpec
    training: TrainingSpec
    decoding: DecodingSpec

    def __post_init__(self) -> None:
        _choice("task", self.task, tuple(ATTENTION_KINDS))
        _choice("parallel", self.parallel, ("jit", "pmap"))
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"seeds={self.seeds!r} must be distinct integers, at least one")
        for kind in ATTENTION_KINDS[self.task]:
            self.model.heads(kind)
        if self.data.length > self.model.max_length:
            raise UserError(
                f"data.length={self.data.length} is longer than model.max_length={self.model.max_length} positions"
            )
        if self.task == "translation" and self.data.source not in ("parallel", "tfds"):
            raise UserError(f"task='translation' needs data.source='parallel' or 'tfds', not {self.data.source!r}")
        if self.task == "classification" and not self.data.num_classes:
            raise UserError("task='classification' needs data.num_classes")
        if self.parallel == "pmap" and (self.mesh.seed, self.mesh.head) != (1, 1):
            raise UserError(
                f"parallel='pmap' splits data only; mesh.seed={self.mesh.seed} and mesh.head={self.mesh.head} need 'jit'"
            )
        if len(self.seeds) % self.mesh.seed:
            raise UserError(f"{len(self.seeds)} seeds do not split over mesh.seed={self.mesh.seed} devices")

    def check_devices(self, num_devices: int) -> None:
        """Raises UserError where batch or heads do not divide over the devices of the machine at hand."""
        _, data, head = self.mesh.sizes(num_devices)
        if self.data.batch_size % data:
            fits = [d for d in _divisors(self.data.batch_size) if d <= num_devices]
            raise UserError(
                f"data.batch_size={self.data.batch_size} is not a multiple of {data} data devices; {_listing(fits)} fit"
            )
        for kind in ATTENTION_KINDS[self.task]:
            for shape in self.model.heads(kind):
                common = math.gcd(shape.num_heads, shape.num_kv_heads)
                if common % head:
                    raise UserError(
                        f"mesh.head={head} does not divide num_heads={shape.num_heads} and "
                        f"num_kv_heads={shape.num_kv_heads}; {_listing(_divisors(common))} fit"
                    )
