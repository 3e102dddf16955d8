"""Writing token after token: greedy or drawn for language models, beam search for translation."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from mha_jax.models.cache import Cache, Memory, cached_step, empty_cache, read_memory
from mha_jax.models.transformer import LanguageModel, TranslationModel
from mha_jax.specs import BOS, EOS, MASK, PAD, UserError

_NEVER = (PAD, BOS, MASK)  # no targets in the vocabularies made here


def _check_length(model: LanguageModel | TranslationModel, max_length: int) -> None:
    positions = model.decoder.positions
    if not 1 <= max_length <= positions.max_length:
        raise UserError(f"max_length={max_length} must be between 1 and model.max_length={positions.max_length}")


def _next_token_scores(
    model: LanguageModel | TranslationModel,
    tokens_N: Array,
    position: Array,
    cache: Cache,
    memory: Memory | None = None,
    never: Sequence[int] = _NEVER,
) -> tuple[Array, Cache]:
    """Log probabilities [N, C] of the token after `position`; -inf for the tokens of `never`."""
    x_N1D, cache = cached_step(model.decoder, model.tokens.embed(tokens_N[:, None]), position, cache, memory)
    scores_NC = jax.nn.log_softmax(model.tokens.logits(x_N1D)[:, 0])
    return scores_NC.at[:, jnp.array(never, int)].set(-jnp.inf), cache


def generate(
    model: LanguageModel,
    prompt_BT: Int[Array, "B T"],
    prompt_lengths_B: Int[Array, " B"],
    *,
    max_length: int,
    end: int = EOS,
    never: Sequence[int] = _NEVER,
    key: Key[Array, ""] | None = None,
) -> Int[Array, "B max_length"]:
    """Continues prompts: each next token is the most probable one, or with a `key` drawn from the probabilities.

    Args:    prompt_lengths_B: at least 1; rows may differ, what lies beyond is not read.
             end: the token that ends a text; llama2.c's models end one with the BOS of the next.
             never: tokens that are not written, `end` excepted: those that are no text in the model's vocabulary.
    Returns: prompt, continuation up to and with the end token, then PAD.
    Raises:  UserError where max_length is shorter than the prompts' array or longer than the model's positions.
    """
    _check_length(model, max_length)
    rows, width = prompt_BT.shape
    if width > max_length:
        raise UserError(f"max_length={max_length} is shorter than the prompts, which are {width} tokens long")
    tokens_BT = jnp.pad(prompt_BT, ((0, 0), (0, max_length - width)))
    never = [token for token in never if token != end]

    def going_on(state: tuple[Array, Array, Array, Cache]) -> Array:
        position, _, ended_B, _ = state
        return (position < max_length - 1) & ~ended_B.all()

    def write(state: tuple[Array, Array, Array, Cache]) -> tuple[Array, Array, Array, Cache]:
        position, tokens_BT, ended_B, cache = state
        here_B = lax.dynamic_index_in_dim(tokens_BT, position, axis=1, keepdims=False)
        given_B = lax.dynamic_index_in_dim(tokens_BT, position + 1, axis=1, keepdims=False)
        scores_BC, cache = _next_token_scores(model, here_B, position, cache, never=never)
        if key is None:
            best_B = scores_BC.argmax(axis=-1)
        else:
            best_B = jax.random.categorical(jax.random.fold_in(key, position), scores_BC)
        chosen_B = jnp.where(ended_B, PAD, best_B).astype(tokens_BT.dtype)
        in_prompt_B = position + 1 < prompt_lengths_B
        next_B = jnp.where(in_prompt_B, given_B, chosen_B)
        ended_B = ended_B | ((next_B == end) & ~in_prompt_B)
        return position + 1, tokens_BT.at[:, position + 1].set(next_B), ended_B, cache

    state = (jnp.array(0), tokens_BT, jnp.zeros(rows, bool), empty_cache(model.decoder, rows, max_length))
    _, tokens_BT, _, _ = lax.while_loop(going_on, write, state)
    return tokens_BT


class _Beams(NamedTuple):
    """W hypotheses a sentence that go on, and the best one that has ended."""

    position: Array
    tokens_BWT: Array
    scores_BW: Array  # log probability so far; -inf: no hypothesis
    best_tokens_BT: Array
    best_score_B: Array  # penalised; -inf: none has ended
    cache: Cache


def _first_beams(model: TranslationModel, sentences: int, beam_size: int, max_length: int) -> _Beams:
    """One empty hypothesis a sentence; the others of its beam do not exist yet."""
    cache = empty_cache(model.decoder, sentences * beam_size, max_length)
    scores_W = jnp.where(jnp.arange(beam_size) == 0, 0.0, -jnp.inf).astype(model.tokens.param_dtype)
    return _Beams(
        position=jnp.array(0),
        tokens_BWT=jnp.full((sentences, beam_size, max_length), PAD),
        scores_BW=jnp.tile(scores_W, (sentences, 1)),
        best_tokens_BT=jnp.full((sentences, max_length), PAD),
        best_score_B=jnp.full(sentences, -jnp.inf, scores_W.dtype),
        cache=cache,
    )


def _penalty(length: Array | int, alpha: float) -> Array:
    return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** alpha


def _can_improve(beams: _Beams, alpha: float) -> Array:
    """Per sentence: could a hypothesis that goes on still beat the best that has ended? Log probabilities only fall."""
    max_length = beams.tokens_BWT.shape[-1]
    hope_B = beams.scores_BW.max(axis=-1) / _penalty(max_length, alpha)
    return hope_B > beams.best_score_B


def _extend(beams: _Beams, scores_BWC: Array, cache: Cache, alpha: float) -> _Beams:
    """One more token: of the 2W best candidates the W best may end, and the W best that do not end go on."""
    sentences, width, num_tokens = scores_BWC.shape
    totals_BX = (beams.scores_BW[:, :, None] + scores_BWC).reshape(sentences, -1)
    # At most W candidates end (one a hypothesis), so 2W hold W that go on.
    top_BX, index_BX = lax.top_k(totals_BX, min(2 * width, width * num_tokens))
    parent_BX, token_BX = index_BX // num_tokens, index_BX % num_tokens
    ends_BX = token_BX == EOS

    def extended(choice_BY: Array) -> Array:
        parents_BY = jnp.take_along_axis(parent_BX, choice_BY, axis=1)
        tokens_BYT = jnp.take_along_axis(beams.tokens_BWT, parents_BY[:, :, None], axis=1)
        return tokens_BYT.at[:, :, beams.position].set(jnp.take_along_axis(token_BX, choice_BY, axis=1))

    may_end_BX = ends_BX & (jnp.arange(top_BX.shape[1]) < width)[None, :]
    ended_BX = jnp.where(may_end_BX, top_BX, -jnp.inf) / _penalty(beams.position + 1, alpha)
    first_B = ended_BX.argmax(axis=1)
    score_B = ended_BX.max(axis=1)
    better_B = (score_B > beams.best_score_B) & _can_improve(beams, alpha)
    best_tokens_BT = jnp.where(better_B[:, None], extended(first_B[:, None])[:, 0], beams.best_tokens_BT)

    on_BW, choice_BW = lax.top_k(jnp.where(ends_BX, -jnp.inf, top_BX), width)
    parents_BW = jnp.take_along_axis(parent_BX, choice_BW, axis=1)
    rows_N = (jnp.arange(sentences)[:, None] * width + parents_BW).reshape(-1)
    return _Beams(
        beams.position + 1,
        extended(choice_BW),
        on_BW,
        best_tokens_BT,
        jnp.where(better_B, score_B, beams.best_score_B),
        jax.tree.map(lambda x_N: x_N[rows_N], cache),
    )


def translate(
    model: TranslationModel,
    source_BS: Int[Array, "B S"],
    lengths_B: Int[Array, " B"],
    *,
    max_length: int,
    beam_size: int,
    length_penalty: float,
) -> tuple[Int[Array, "B max_length"], Float[Array, " B"]]:
    """Beam search for the translation with the best score, one beam of W hypotheses a sentence.

      score(y | x) = log p(y | x) / ((5 + |y|) / 6) ** length_penalty        (Wu et al. 2016, eq. 14; |y| counts EOS)

    A sentence is settled once no hypothesis that goes on can beat its best ended one; whatever else is in the batch
    then changes nothing. Where none ends within max_length the best unended one is returned. beam_size=1 is greedy
    search, and length_penalty is not used.

    Args:    max_length: of the target, EOS included.
    Returns: tokens up to and with EOS, then PAD; scores.
    Raises:  UserError where max_length is longer than the model's positions.
    """
    _check_length(model, max_length)
    # One hypothesis has no rival of another length; a penalty would only have it search on behind its end.
    alpha = length_penalty if beam_size > 1 else 0.0
    sentences = source_BS.shape[0]
    memory = read_memory(model.decoder, model.encode(source_BS, lengths_B), lengths_B)

    def going_on(beams: _Beams) -> Array:
        return (beams.position < max_length) & _can_improve(beams, alpha).any()

    def write(beams: _Beams) -> _Beams:
        before_BW = lax.dynamic_index_in_dim(
            beams.tokens_BWT, jnp.maximum(beams.position - 1, 0), axis=2, keepdims=False
        )
        last_N = jnp.where(beams.position == 0, BOS, before_BW).reshape(-1)
        scores_NC, cache = _next_token_scores(model, last_N, beams.position, beams.cache, memory)
        return _extend(beams, scores_NC.reshape(sentences, beam_size, -1), cache, alpha)

    beams = lax.while_loop(going_on, write, _first_beams(model, sentences, beam_size, max_length))
    ended_B = jnp.isfinite(beams.best_score_B)
    unended_B = beams.scores_BW[:, 0] / _penalty(beams.position, alpha)
    return (
        jnp.where(ended_B[:, None], beams.best_tokens_BT, beams.tokens_BWT[:, 0]),
        jnp.where(ended_B, beams.best_score_B, unended_B),
    )
