"""Roles of models are those of their maps, read in batches; sentences reach the heads as words."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mha_jax.data.conllu import read
from mha_jax.data.tokenizers import ByteTokenizer
from mha_jax.data.words import word_rows
from mha_jax.heads import attention_maps, attentions
from mha_jax.heads.coreference import asked
from mha_jax.heads.reading import TokenKinds, head_roles, repeated_tokens
from mha_jax.heads.relations import ALL, arcs, best_heads, halves
from mha_jax.heads.roles import CROSS, REPEATED, SELF, RoleTable, Tokens, role_sums
from mha_jax.heads.treebank_maps import text_maps, text_rows, word_maps
from mha_jax.heads.word_maps import to_words
from mha_jax.models import build_model
from tests import tiny

EWT = Path(__file__).resolve().parents[3] / "shared" / "data" / "ud_english_ewt"
TOKENIZER = ByteTokenizer()
KINDS = TokenKinds.of(TOKENIZER, np.arange(TOKENIZER.vocab_size))
STACKS = {"lm": ("decoder",), "masked_lm": ("encoder",), "translation": ("encoder", "decoder")}


def made(task, **overrides: Any):
    run = tiny.run(task, seeds=(0,), **overrides)
    model = nnx.jit(lambda: build_model(run, rngs=nnx.Rngs(0)))()
    return model, [jax.tree.map(lambda leaf: leaf[0], batch) for batch in tiny.batches(run, 2)]


def test_token_kinds_are_those_of_the_tokenizer():
    comma, letter = (TOKENIZER.encode([text])[0][0] for text in (",", "a"))
    assert KINDS.punctuation[comma] and not KINDS.punctuation[letter]
    assert KINDS.special[:4].all() and KINDS.special.sum() == 4 and not KINDS.punctuation[:4].any()


@pytest.mark.slow
@pytest.mark.parametrize("task", list(STACKS))
def test_roles_of_a_model_are_those_of_its_maps(task):
    # All maps have one shape, so that there is one program of each kind.
    sizes = {"data__buckets": (12,), "data__batch_tokens": 48} if task == "translation" else {"data__batch_size": 4}
    model, batches = made(task, model__num_heads=2, model__num_layers=1, data__length=12, **sizes)
    kinds = dict.fromkeys(STACKS[task], KINDS)
    random = repeated_tokens(task, kinds, 4, 12)
    found = head_roles(model, batches, kinds, random)
    assert list(found) == list(attentions(model))
    name = list(found)[-1]
    assert found[name].roles.mean.keys() == ({*CROSS} if task == "translation" else {*SELF, REPEATED})
    # The same from the whole maps, in which nothing is hidden.
    name = next(iter(found))
    inputs = "source" if task == "translation" else "targets" if task == "masked_lm" else "inputs"
    sums = []
    for batch in batches:
        shown = {**batch, "inputs": batch["targets"]} if task == "masked_lm" else batch
        maps = jax.jit(attention_maps, static_argnames="layers")(model, shown, layers=(name,))[name]
        ids, weights = batch[inputs], batch["weights"]
        lengths = batch.get("source_lengths", batch.get("lengths", np.full(len(ids), ids.shape[1])))
        real = np.arange(ids.shape[1]) < lengths[:, None]
        counted = (weights > 0 if task == "lm" else real & (weights > 0).any(1, keepdims=True)) & ~KINDS.special[ids]
        seen = np.tril(np.ones((ids.shape[1],) * 2, bool))[None] if task == "lm" else real[:, None]
        visible = np.broadcast_to(seen, (len(ids), ids.shape[1], ids.shape[1]))[:, None]
        facts = (ids, ids, counted, KINDS.special[ids], KINDS.punctuation[ids], KINDS.counts[ids])
        sums.append(role_sums(jnp.asarray(maps), jnp.asarray(visible), Tokens(*map(jnp.asarray, facts))))
    expected = RoleTable.of(SELF, jax.tree.map(lambda *x: np.concatenate(x), *sums))
    for role in SELF:
        np.testing.assert_allclose(found[name].roles.mean[role], expected.mean[role], atol=1e-5)
        np.testing.assert_allclose(found[name].roles.low[role], expected.low[role], atol=1e-4)


def test_repeated_tokens_repeat_and_are_ordinary():
    batch = repeated_tokens("translation", {"encoder": KINDS, "decoder": KINDS}, 3, 13)
    for name in ("source", "target_inputs"):
        np.testing.assert_array_equal(batch[name][:, :6], batch[name][:, 6:])
        assert not KINDS.special[batch[name]].any()
    assert np.any(batch["source"] != batch["target_inputs"])


@pytest.fixture(scope="module")
def treebank():
    if not EWT.exists():
        pytest.skip("the English Web Treebank is not here")
    return read(EWT / "en_ewt-ud-dev.conllu.gz", 50)


@pytest.fixture(scope="module")
def reader():
    return made("lm", data__length=96, model__max_length=96, model__num_layers=1, model__num_heads=2)[0]


@pytest.mark.slow
def test_words_of_real_sentences_are_read_in_every_length(treebank, reader):
    rows = word_rows(treebank, TOKENIZER, "lm", 96)
    batches = list(word_maps(reader, rows))
    read_names = sorted(s.name for batch in batches for s in batch.sentences)
    assert read_names == sorted(s.name for s in rows.sentences) and rows.left_out
    assert len({batch.visible.shape for batch in batches}) > 1  # short sentences in smaller maps
    # One sentence, read alone in rows of the full length.
    name, last = "decoder/0/attention", batches[0].sentences[-1]
    (alone,) = word_rows([last], TOKENIZER, "lm", 96).batches(1)
    whole = attention_maps(reader, jax.tree.map(jnp.asarray, alone.batch))[name]
    expected = to_words(whole, jnp.asarray(alone.words), len(last.words))
    own = batches[0].weights[name][len(batches[0].sentences) - 1, :, : len(last.words), : len(last.words)]
    np.testing.assert_allclose(own, expected[0], atol=1e-5)
    words = np.arange(len(last.words))
    seen = batches[0].visible[len(batches[0].sentences) - 1][: len(words), : len(words)]
    np.testing.assert_array_equal(seen, words[:, None] >= words[None])


@pytest.mark.slow
def test_causal_heads_see_the_relations_of_real_sentences_in_one_direction(treebank, reader):
    found = arcs(word_maps(reader, word_rows(treebank, TOKENIZER, "lm", 96)))
    rows = {(row.relation, row.direction): row for row in best_heads(*halves(found), least=3)}
    # In English a determiner stands before its noun: only the noun can see it.
    assert ("det", "dependent") not in rows
    det = rows["det", "head"]
    assert det.offset == 1 and det.left_out == 0 and det.baseline.mean > 0.3
    assert rows[ALL, "head"].left_out > 0


@pytest.mark.slow
def test_texts_of_a_document_are_read_at_once(treebank, reader):
    mentions = {s.name: [(0, 0, "e"), (len(s.words) - 1, len(s.words) - 1, "e")] for s in treebank if len(s.words) > 1}
    texts, rows = text_rows(treebank, TOKENIZER, "lm", 96, mentions)
    assert len(texts) < len(treebank) - len(rows.left_out)
    assert all(len(ids) <= 96 for ids in rows.ids)
    found = asked(text_maps(reader, texts, rows))
    assert len(found.kind) == sum(sum(m.start > text.mentions[0].end for m in text.mentions) for text in texts)
    assert found.hits.min() == found.hits.max() == 1  # there is only one entity
