"""BERT, GPT-2 and llama against the models that `transformers` makes (requirements-parity.txt); skipped without it."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax.pretrained import directory, families
from mha_jax.pretrained.agreement import agreement, hidden_states
from tests.pretrained import checkpoints

pytestmark = pytest.mark.slow
# Both take seconds to import, which those who leave these tests out should not wait for.
if find_spec("torch") is None or find_spec("transformers") is None:
    pytest.skip("requirements-parity.txt is not installed", allow_module_level=True)
TOLERANCE = 1e-5  # measured: at most 2e-6 at 12 layers
VOCABULARY = 97
BERT = {"hidden_size": 36, "num_attention_heads": 3, "intermediate_size": 50, "max_position_embeddings": 20}
LLAMA = BERT | {"num_attention_heads": 6, "num_key_value_heads": 2}
GPT2 = {"n_embd": 36, "n_head": 3, "n_positions": 20, "bos_token_id": 0, "eos_token_id": 0}


def theirs(kind: str, layers: int) -> Any:
    """A model as `transformers` draws it, every parameter moved: none keeps a bias of 0 or a gain of 1."""
    import torch
    import transformers

    if kind == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers, vocab_size=VOCABULARY, **GPT2))
    elif kind in ("llama", "llama_untied"):
        tied = {"tie_word_embeddings": kind == "llama"}
        config = transformers.LlamaConfig(num_hidden_layers=layers, vocab_size=VOCABULARY, **LLAMA, **tied)
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.BertConfig(num_hidden_layers=layers, vocab_size=VOCABULARY, num_labels=3, **BERT)
        of_kind = {"bert": "BertForMaskedLM", "bert_classifier": "BertForSequenceClassification"}
        model = getattr(transformers, of_kind.get(kind, kind))(config)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=drawn))
    return model.eval()


def outputs(model: Any, tokens_BT: np.ndarray, real_BT: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    import torch

    with torch.no_grad():
        mask = torch.tensor(real_BT.astype(int))
        found = model(input_ids=torch.tensor(tokens_BT), attention_mask=mask, output_hidden_states=True)
    return [state.numpy() for state in found.hidden_states], found.logits.numpy()


CASES = [("bert", 2), ("bert", 6), ("bert", 12), ("gpt2", 2), ("gpt2", 6), ("gpt2", 12)]


@pytest.mark.parametrize(("kind", "layers"), [*CASES, ("bert_classifier", 2), ("llama", 2), ("llama_untied", 2)])
def test_hidden_states_and_logits_are_those_of_transformers(tmp_path: Path, kind: str, layers: int):
    model = theirs(kind, layers)
    model.save_pretrained(tmp_path)
    tokens_BT = np.random.default_rng(0).integers(0, VOCABULARY, (3, 17))
    lengths_B = np.array([17, 9, 5])
    real_BT = np.arange(17)[None, :] < lengths_B[:, None]
    states, logits = outputs(model, tokens_BT, real_BT)
    ours = checkpoints.model_of(families.read(tmp_path))
    own_states, own_logits = jax.jit(hidden_states)(ours, jnp.asarray(tokens_BT), jnp.asarray(lengths_B))
    assert len(states) == len(own_states) == layers + 1
    if kind in ("gpt2", "llama", "llama_untied"):  # theirs are after the last norm there
        own_states = own_states.at[-1].set(ours.decoder.leave(own_states[-1]))
    for state, own in zip(states, np.asarray(own_states), strict=True):
        assert np.abs(state - own)[real_BT].max() <= TOLERANCE
    apart = np.abs(logits - np.asarray(own_logits))
    assert (apart if apart.ndim == 2 else apart[real_BT]).max() <= TOLERANCE
    assert np.abs(logits).max() > 0.1


@pytest.mark.parametrize("name", ["BertModel", "BertForTokenClassification"])
def test_hidden_states_of_an_encoder_without_our_head_are_those_of_transformers(tmp_path: Path, name: str):
    import torch

    model = theirs(name, 2)
    model.save_pretrained(tmp_path)
    tokens_T = np.random.default_rng(0).integers(0, VOCABULARY, 17)
    with torch.no_grad():
        states = model(input_ids=torch.tensor(tokens_T[None]), output_hidden_states=True).hidden_states
    found = families.read(tmp_path)
    report = agreement(found, checkpoints.model_of(found), [tokens_T])
    assert max(*report["layers"], report["logits"]) <= TOLERANCE
    for state, own in zip(states, found.hidden_states(tokens_T)[:-1], strict=True):
        assert np.abs(state[0].numpy() - own).max() <= TOLERANCE


@pytest.mark.parametrize("kind", ["bert", "bert_classifier", "gpt2", "llama_untied"])
def test_what_is_exported_loads_there_and_computes_the_same(tmp_path: Path, kind: str):
    import transformers

    folder = checkpoints.checkpoint(tmp_path / "in", kind, VOCABULARY)
    found = families.read(folder)
    directory.write(tmp_path / "out", *families.written(checkpoints.run_of(found), found.params))
    model = transformers.AutoConfig.from_pretrained(tmp_path / "out").architectures[0]
    loaded, report = getattr(transformers, model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tokens_BT = np.random.default_rng(0).integers(0, VOCABULARY, (1, 17))
    _, logits = outputs(loaded.eval(), tokens_BT, np.ones((1, 17)))
    assert np.abs(logits[0] - found.hidden_states(tokens_BT[0])[-1]).max() <= TOLERANCE
