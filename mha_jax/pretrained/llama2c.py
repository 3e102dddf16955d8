"""Checkpoints of llama2.c: a Llama in one binary file, read into the trees of our language model.

The format is llama2.c's first ("legacy", version 0), without a magic number: seven little-endian int32, then float32
arrays, each for all layers together, matrices as [out, in] (github.com/karpathy/llama2.c, `export.py`).

Nothing is permuted: llama2.c rotates neighbouring features of a head, as `attention.rotary` does, and its query head h
reads key/value head h // (H / G), as ours does. The gains, matrices and the table are those of the file, bit for bit.
"""

import dataclasses
from typing import Any

import numpy as np
from etils import epath

from mha_jax.pretrained import llama
from mha_jax.specs import HeadShape, UserError

_HEADER = np.dtype("<i4")
_NUMBER = np.dtype("<f4")
FIELDS = ("d_model", "d_ff", "num_layers", "num_heads", "num_kv_heads", "vocab_size", "max_length")
# llama2.c's run.c has both as constants: a checkpoint does not say.
ROPE_BASE, NORM_EPSILON = 10_000.0, 1e-5
# Its arrays by the names of a Llama's safetensors.
_WHOLE = {"embedding": "embed_tokens.weight", "final_norm": "norm.weight", "output": "lm_head.weight"}
_OF_LAYER = {
    "attention_norm": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}


@dataclasses.dataclass(frozen=True)
class Llama2c:
    """A checkpoint: its sizes, and its arrays as they lie in the file, layers first, matrices [out, in]."""

    sizes: dict[str, int]
    arrays: dict[str, np.ndarray]

    tied: bool = True
    task, labels, notes = "lm", None, ()

    @property
    def vocab_size(self) -> int:
        """How many tokens its tokenizer must have."""
        return self.sizes["vocab_size"]

    @property
    def about(self) -> str:
        """What it is, in a line."""
        return f"llama2.c of {self.sizes['num_layers']} layers, d_model={self.sizes['d_model']}"

    @property
    def model(self) -> dict[str, Any]:
        """The fields of `ModelSpec` that make our language model this one."""
        fields = {name: size for name, size in self.sizes.items() if name != "vocab_size"}
        return fields | {
            "positions": "rope",
            "rope_base": ROPE_BASE,
            "norm": "pre",
            "normalization": "rms",
            "norm_epsilon": NORM_EPSILON,
            "activation": "swiglu",
            "use_bias": False,
            "use_ff_bias": False,
            "scale_embedding": False,
            "tied_output": self.tied,
        }

    @property
    def params(self) -> dict[str, Any]:
        """The tree of a `LanguageModel`'s parameters: query.kernel [D, H, K], key and value.kernel [D, G, K], ..."""
        layers = range(self.sizes["num_layers"])
        return {
            "tokens": {name: self.arrays[name] for name in ("embedding", "output") if name in self.arrays},
            "decoder": {
                "blocks": {layer: self._block(layer) for layer in layers},
                "final_norm": {"scale": self.arrays["final_norm"]},
            },
        }

    def _block(self, layer: int) -> dict[str, Any]:
        heads, groups = self.sizes["num_heads"], self.sizes["num_kv_heads"]
        of_layer = {name: array[layer] for name, array in self.arrays.items() if array.ndim > 1}
        d_model = self.sizes["d_model"]

        def into_heads(name: str, count: int) -> dict[str, np.ndarray]:
            return {"kernel": of_layer[name].T.reshape(d_model, count, -1)}

        return {
            "attention_norm": {"scale": of_layer["attention_norm"]},
            "attention": {
                "query": into_heads("wq", heads),
                "key": into_heads("wk", groups),
                "value": into_heads("wv", groups),
                "out": {"kernel": of_layer["wo"].T.reshape(heads, -1, d_model)},
            },
            "feed_forward_norm": {"scale": of_layer["feed_forward_norm"]},
            "feed_forward": {
                "gating": {"kernel": of_layer["w1"].T},
                "down": {"kernel": of_layer["w2"].T},
                "up": {"kernel": of_layer["w3"].T},
            },
        }

    def hidden_states(self, tokens_T: np.ndarray) -> list[np.ndarray]:
        """The float64 forward pass of the arrays: what each layer reads, the last one's output, logits."""
        tensors = {name: self.arrays[own] for own, name in _WHOLE.items() if own in self.arrays}
        for layer in range(self.sizes["num_layers"]):
            tensors |= {f"layers.{layer}.{name}.weight": self.arrays[own][layer] for own, name in _OF_LAYER.items()}
        shape = HeadShape.resolve(self.sizes["d_model"], self.sizes["num_heads"], self.sizes["num_kv_heads"])
        shapes = [shape] * self.sizes["num_layers"]
        return llama.forward(tensors, shapes, tokens_T, base=ROPE_BASE, epsilon=NORM_EPSILON, halves=False)


def read(path: epath.PathLike) -> Llama2c:
    """Reads a checkpoint, checking its size to the byte.

    Raises: UserError for a file that does not exist, has no such header, is too short or too long, or holds numbers
        that are not finite.
    """
    file = epath.Path(path)
    if not file.exists() or file.is_dir():
        raise UserError(f"checkpoint {path} is no file")
    raw = file.read_bytes()
    sizes, tied = _sizes(path, raw)
    shapes = _shapes(sizes, tied)
    start = _HEADER.itemsize * len(FIELDS)
    expected = start + _NUMBER.itemsize * sum(int(np.prod(shape)) for shape in shapes.values())
    if len(raw) != expected:
        raise UserError(
            f"checkpoint {path} has {len(raw)} bytes; a llama2.c checkpoint with the sizes in its header "
            f"({', '.join(f'{name}={size}' for name, size in sizes.items())}) has {expected}"
        )
    arrays = {}
    for name, shape in shapes.items():
        arrays[name] = np.frombuffer(raw, _NUMBER, int(np.prod(shape)), start).reshape(shape)
        start += arrays[name].nbytes
        if not np.isfinite(arrays[name]).all():
            raise UserError(f"checkpoint {path} is damaged: {name} holds numbers that are not finite")
    del arrays["rotary_cos"], arrays["rotary_sin"]  # computed, not read: `attention.rotary`
    return Llama2c(sizes, arrays, tied)


def _sizes(path: epath.PathLike, raw: bytes) -> tuple[dict[str, int], bool]:
    """The header, and whether the table is the output's too: of one with two the vocabulary's size is negative."""
    if len(raw) < _HEADER.itemsize * len(FIELDS):
        raise UserError(f"checkpoint {path} has {len(raw)} bytes, fewer than the header of a llama2.c checkpoint")
    sizes: dict[str, int] = dict(zip(FIELDS, np.frombuffer(raw, _HEADER, len(FIELDS)).tolist(), strict=True))
    given = list(sizes.values())
    tied, sizes["vocab_size"] = sizes["vocab_size"] > 0, abs(sizes["vocab_size"])
    heads, groups = sizes["num_heads"], sizes["num_kv_heads"]
    plausible = all(0 < size < 1 << 24 for size in sizes.values())
    if not plausible or sizes["d_model"] % heads or heads % groups or sizes["d_model"] // heads % 2:
        raise UserError(
            f"{path} is no llama2.c checkpoint (version 0): its first seven int32, read as {', '.join(FIELDS)}, "
            f"are {', '.join(map(str, given))}"
        )
    return sizes, tied


def _shapes(sizes: dict[str, int], tied: bool) -> dict[str, tuple[int, ...]]:
    """What the file holds, in its order."""
    D, F, L, H, G, C, T = sizes.values()
    keys = G * D // H
    return {
        "embedding": (C, D),
        "attention_norm": (L, D),
        "wq": (L, D, D),
        "wk": (L, keys, D),
        "wv": (L, keys, D),
        "wo": (L, D, D),
        "feed_forward_norm": (L, D),
        "w1": (L, F, D),
        "w2": (L, D, F),
        "w3": (L, F, D),
        "final_norm": (D,),
        "rotary_cos": (T, D // H // 2),
        "rotary_sin": (T, D // H // 2),
        **({} if tied else {"output": (C, D)}),
    }
