"""Checkpoint directories with random weights, written without torch: names and shapes as the files have them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from configs import default
from mha_jax import config as configs
from mha_jax.pretrained import families
from mha_jax.specs import RunSpec
from mha_jax.sweeps.imported import imported_state
from mha_jax.training.step import merge

_BERT = {"model_type": "bert", "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
_BERT |= {"intermediate_size": 14, "max_position_embeddings": 19, "type_vocab_size": 2, "hidden_act": "gelu"}
_BERT |= {"layer_norm_eps": 1e-3, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
_GPT2 = {"model_type": "gpt2", "n_embd": 12, "n_layer": 2, "n_head": 3, "n_inner": None, "n_positions": 19}
_GPT2 |= {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-3}
_GPT2 |= {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
_LLAMA = {"model_type": "llama", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6}
_LLAMA |= {"num_key_value_heads": 2, "intermediate_size": 14, "max_position_embeddings": 19, "hidden_act": "silu"}
_LLAMA |= {"rms_norm_eps": 1e-3, "rope_theta": 10_000.0, "tie_word_embeddings": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": _BERT | {"architectures": ["BertForMaskedLM"]},
    "bert_classifier": _BERT | {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b"}},
    "gpt2": _GPT2 | {"architectures": ["GPT2LMHeadModel"]},
    "llama": _LLAMA | {"architectures": ["LlamaForCausalLM"]},
    "gpt2_untied": _GPT2 | {"architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": False},
    "llama_untied": _LLAMA | {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False},
}


def checkpoint(folder: Path, kind: str, vocab_size: int = 97, seed: int = 0, **changes: Any) -> Path:
    """Writes config.json and model.safetensors; gains about 1, biases about 0, none of them at its start."""
    config = CONFIGS[kind] | {"vocab_size": vocab_size} | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)
    family = next(one for one in families.FAMILIES if config["model_type"] == one.MODEL_TYPE)
    gains = ("LayerNorm.weight", "layernorm.weight", "norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")
    tensors = {
        one.name: rng.normal(float(one.name.endswith(gains)), 0.2, one.shape).astype(np.float32)
        for one in family.entries(config)
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def headless(folder: Path, kind: str, vocab_size: int = 97, **changes: Any) -> Path:
    """The checkpoint of `kind` as that of its BertModel or LlamaModel: no head, and names without their prefix."""
    checkpoint(folder, kind, vocab_size, **changes)
    config, tensors = (folder / "config.json"), load_file(folder / "model.safetensors")
    prefix, name = {"bert": ("bert.", "BertModel"), "llama": ("model.", "LlamaModel")}[kind]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": [name]}))
    kept = {one.removeprefix(prefix): tensor for one, tensor in tensors.items() if one.startswith(prefix)}
    save_file(kept, folder / "model.safetensors")
    return folder


def run_of(found: families.Checkpoint, **more: Any) -> RunSpec:
    values = {f"model.{name}": value for name, value in found.model.items()} | {"seeds": (0,), "task": found.task}
    values |= {"data.length": 16, "data.tokenizer": "json", "data.tokenizer_file": "unused"}
    values |= {"data.source": "labelled", "data.files.train": "unused"} if found.labels else {}
    values |= {"data.num_classes": len(found.labels)} if found.labels else {}
    values |= {"data.vocab_size": found.vocab_size} | more
    return configs.resolve(configs.override(default.get_config(), values))


def model_of(found: families.Checkpoint) -> Any:
    import jax

    run = run_of(found)
    state = imported_state(run, found.params)
    return merge(run, *jax.tree.map(lambda leaf: leaf[0], (state["params"], state["constants"])))
