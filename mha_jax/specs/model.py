"""The model's section: how deep, how wide, how many heads of which width in every layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from mha_jax.specs.checks import UserError, at_least, choice, rate
from mha_jax.specs.heads import HeadShape
from mha_jax.specs.routing import RoutingSpec, SpanSpec

HeadCount = int | tuple[int, ...] | Mapping[str, Any]
HeadMap = tuple[int, ...] | tuple[tuple[int, ...] | None, ...] | Mapping[str, Any]


# By name, so that a wrong one is found without JAX; `mha_jax.attention.BACKENDS` has what they stand for.
BACKENDS = ("auto", "einsum", "blockwise", "diagonals", "strips", "cudnn", "pallas", "rows", "splash")


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A stack of Transformer blocks.

    `num_heads`, `num_kv_heads`, `qk_dim` and `v_dim` are each one value, a tuple with one a layer, or a dict by kind of
    attention ("encoder", "decoder", "cross") whose values are either. Widths are per head; None derives d_model / H.
    `head_to_group` likewise: one map (a group for each head) for all layers, a tuple with a map or None for each layer,
    or a dict by kind; None is the map of neighbouring heads, for which G must divide H.

    `use_bias` is of the attentions, `use_ff_bias` of the feed-forward layers. Tokens and learned positions enter times
    sqrt(d_model), or as their embedding is without `scale_embedding`; with `embedding_norm` their sum is normalized.
    `token_types`: so many more vectors, of which every token adds one (the segments of BERT), for tasks that only
    encode. `tied_output`: logits are products with the table that tokens are read from; else with one more, as many
    Llamas have it. `pooling`: a classifier reads the "mean" over a text, or its "first" token through a layer of its
    own.
    "gelu" is the approximation by tanh (GPT-2), "gelu_exact" the one by erf (BERT).

    `routing`: heads chosen by the token. `adaptive_span`: a learned span for each head of self-attention.
    `layers`: "unrolled", or "scan" neighbours of equal shape: less to compile in deep models.
    `remat`: what the backward pass computes again instead of keeping it: "none", the "attention" sublayers, all but
    products with weights ("dots"), all but the inputs of each "block".
    Neither changes a result beyond rounding; both count in a run's hash as the backend does: rounding grows with steps.
    """

    num_layers: int
    d_model: int
    num_heads: HeadCount
    d_ff: int
    max_length: int
    num_kv_heads: HeadCount | None = None
    qk_dim: HeadCount | None = None
    v_dim: HeadCount | None = None
    head_to_group: HeadMap | None = None
    positions: Literal["sinusoidal", "learned", "rope", "none"] = "learned"
    rope_base: float = 10_000.0
    norm: Literal["pre", "post"] = "pre"
    normalization: Literal["layer", "rms"] = "layer"
    norm_epsilon: float = 1e-6
    activation: Literal["relu", "gelu", "gelu_exact", "swiglu"] = "gelu"
    use_bias: bool = False
    use_ff_bias: bool = True
    scale_embedding: bool = True
    embedding_norm: bool = False
    token_types: int = 0
    tied_output: bool = True
    pooling: Literal["mean", "first"] = "mean"
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    match: Literal["none", "params", "flops"] = "none"
    match_base: Mapping[str, Any] | None = None
    init: Literal["independent", "shared"] = "independent"
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    backend: str = "auto"
    layers: Literal["unrolled", "scan"] = "unrolled"
    remat: Literal["none", "attention", "dots", "block"] = "none"
    routing: RoutingSpec = dataclasses.field(default_factory=RoutingSpec)
    adaptive_span: SpanSpec = dataclasses.field(default_factory=SpanSpec)

    def __post_init__(self) -> None:
        for field in ("num_layers", "d_model", "d_ff", "max_length"):
            at_least(f"model.{field}", getattr(self, field), 1)
        choice("model.positions", self.positions, ("sinusoidal", "learned", "rope", "none"))
        choice("model.norm", self.norm, ("pre", "post"))
        choice("model.normalization", self.normalization, ("layer", "rms"))
        choice("model.activation", self.activation, ("relu", "gelu", "gelu_exact", "swiglu"))
        choice("model.pooling", self.pooling, ("mean", "first"))
        at_least("model.token_types", self.token_types, 0)
        choice("model.match", self.match, ("none", "params", "flops"))
        choice("model.init", self.init, ("independent", "shared"))
        choice("model.dtype", self.dtype, ("float32", "bfloat16", "float64"))
        choice("model.backend", self.backend, BACKENDS)
        self.adaptive_span.check_backend(self.backend)
        choice("model.layers", self.layers, ("unrolled", "scan"))
        choice("model.remat", self.remat, ("none", "attention", "dots", "block"))
        for field in ("rope_base", "norm_epsilon"):
            if not getattr(self, field) > 0:
                raise UserError(f"model.{field}={getattr(self, field)!r} must be positive")
        rate("model.dropout_rate", self.dropout_rate)
        rate("model.attention_dropout_rate", self.attention_dropout_rate)
        if self.match != "none" and self.match_base is None:
            raise UserError(
                f"model.match={self.match!r} needs model.match_base, the head shape whose cost every cell shall have"
            )

    def heads(self, kind: str) -> tuple[HeadShape, ...]:
        """The head shape of each layer for one kind of attention: "encoder", "decoder" or "cross"."""
        shapes = []
        for layer in range(self.num_layers):
            fields = [self._of_layer(name, kind, layer) for name in ("num_heads", "num_kv_heads", "qk_dim", "v_dim")]
            try:
                shape = HeadShape.resolve(self.d_model, *fields, head_to_group=self._map_of_layer(kind, layer))
                self.routing.check(shape)
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

    def _of_layer(self, field: str, kind: str, layer: int) -> Any:
        value = self._of_kind(field, kind)
        if isinstance(value, (tuple, list)):
            self._check_layers(field, kind, len(value))
            value = value[layer]
        return value

    def _map_of_layer(self, kind: str, layer: int) -> Any:
        value = self._of_kind("head_to_group", kind)
        # A list of maps, where a list of numbers would be one map.
        if isinstance(value, (tuple, list)) and any(one is None or isinstance(one, (tuple, list)) for one in value):
            self._check_layers("head_to_group", kind, len(value))
            value = value[layer]
        if value is None:
            return None
        if not isinstance(value, (tuple, list)) or any(type(group) is not int for group in value):
            raise UserError(f"model.head_to_group={value!r} must be None or a list with the number of a group a head")
        return tuple(value)

    def _of_kind(self, field: str, kind: str) -> Any:
        value: Any = getattr(self, field)
        if not isinstance(value, Mapping):
            return value
        if kind not in value:
            raise UserError(f"model.{field} has no entry for {kind!r}; it has {', '.join(map(repr, value))}")
        return value[kind]

    def _check_layers(self, field: str, kind: str, count: int) -> None:
        if count != self.num_layers:
            raise UserError(f"model.{field} lists {count} layers for {kind!r}; model.num_layers={self.num_layers}")
