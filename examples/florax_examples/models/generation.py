"""Greedy decoding and beam search with a cache, for all models of this folder that write text.

For T5 the prompt is the decoder's start token, `decode` is `functools.partial(model.decode,
encoded=None, encoder_mask=mask)` and the cache comes from `model.init_cache(..., encoded=encoded)`.
"""

from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

Tokens = None | int | tuple[int, ...]


class Decode(Protocol):
    """Logits for the token after each of `ids`, shape (B, T, V), and the next cache."""

    def __call__(
        self, ids: Array, *, positions: Array, mask: Array | None = None, cache: Any
    ) -> tuple[Array, Any]: ...


def greedy(
    decode: Decode, cache: Any, prompt: Array, mask: Array, new_tokens: int, eos: Tokens, pad: int
) -> Array:
    """Extend each prompt by its likeliest next token, again and again. Made to run under jit.

    Args:
      decode: such as a model.
      cache: an empty cache with room for the longest prompt and `new_tokens` more.
      prompt: token ids, shape (B, T), int32, padded on either side.
      mask: shape (B, T), bool, False for padding.
      new_tokens: how many tokens to write at most.
      eos: a row that wrote this token, or one of these, is done; None means that no row ever is.
      pad: what a row that is done is filled with.

    Returns:
      The new tokens, shape (B, new_tokens), int32.
    """
    _at_least_one(new_tokens=new_tokens)
    batch, eos = len(prompt), _as_array(eos)
    cache, token, position = _read(decode, cache, prompt, mask)

    def keep_going(carry):
        count, _, _, done, _ = carry
        return (count < new_tokens) & ~done.all()

    def extend(carry):
        count, token, written, done, cache = carry
        positions = (position + count)[:, None]
        logits, cache = decode(token[:, None], positions=positions, cache=cache)
        token = jnp.where(done, pad, jnp.argmax(logits[:, 0], axis=-1)).astype(jnp.int32)
        written = written.at[:, count].set(token)
        return count + 1, token, written, done | jnp.isin(token, eos), cache

    written = jnp.full((batch, new_tokens), pad, jnp.int32)
    start = jnp.int32(0), token, written, jnp.zeros(batch, bool), cache
    return jax.lax.while_loop(keep_going, extend, start)[2]


def write(*arguments: Any, beams: int, batch_axis: Any, length_penalty: float = 1.0) -> Array:
    """The best that `beam_search` finds, or with one beam what `greedy` does: (B, new_tokens).

    The `arguments` are what both have, in their order.
    """
    if beams == 1:
        return greedy(*arguments)
    options = {"beams": beams, "batch_axis": batch_axis, "length_penalty": length_penalty}
    return beam_search(*arguments, **options)[0][:, 0]


class _Beams(NamedTuple):
    """Of each row K continuations that go on and K that are done, both best first."""

    count: Array  # shape (), int32; tokens written so far
    token: Array  # (B, K), int32; the last of them, or of the prompt
    tokens: Array  # (B, K, new_tokens), int32; all of them
    scores: Array  # (B, K); the sums of their log-probabilities
    done_tokens: Array  # (B, K, new_tokens), int32
    done_scores: Array  # (B, K); with the length penalty; -inf where nothing is done yet
    improves: Array  # (B,), bool; whether what goes on might still beat what is done


class _Search(NamedTuple):
    """The rules of `beam_search`."""

    new_tokens: int
    eos: Array
    length_penalty: float
    early_stopping: bool | Literal["never"]

    def is_open(self, state: _Beams) -> Array:
        """Which rows go on, (B,)."""
        if self.early_stopping is True:
            return state.improves & jnp.isneginf(state.done_scores).any(axis=1)
        return state.improves

    def normalized(self, scores: Array, length: Array | int) -> Array:
        return scores / jnp.asarray(length, jnp.float32) ** self.length_penalty

    def extend(self, state: _Beams, logits: Array) -> tuple[_Beams, Array]:
        """The state with a token more, and which beams, (B, K), its beams were before."""
        batch, beams, vocabulary = logits.shape
        candidates = max(2, 1 + len(self.eos)) * beams  # if all that can end do, `beams` go on
        count = state.count + 1
        scores = state.scores[..., None] + jax.nn.log_softmax(logits.astype(jnp.float32))
        scores, index = jax.lax.top_k(scores.reshape(batch, -1), candidates)
        parents, token = index // vocabulary, index % vocabulary
        tokens = _pick(state.tokens, parents).at[:, :, state.count].set(token)
        ends = jnp.isin(token, self.eos) | (count == self.new_tokens)

        may_be_done = ends & (jnp.arange(candidates) < beams) & self.is_open(state)[:, None]
        new_scores = jnp.where(may_be_done, self.normalized(scores, count), -jnp.inf)
        done_scores = jnp.concatenate([state.done_scores, new_scores], axis=1)
        done_scores, best = jax.lax.top_k(done_scores, beams)
        done_tokens = _pick(jnp.concatenate([state.done_tokens, tokens], axis=1), best)

        scores, best = jax.lax.top_k(jnp.where(ends, -jnp.inf, scores), beams)
        parents, token, tokens = (_pick(x, best) for x in (parents, token, tokens))
        final = count
        if self.early_stopping == "never":
            final = jnp.where(jnp.asarray(self.length_penalty) > 0, self.new_tokens, count)
        hoped_for = self.normalized(scores[:, 0], final)
        improves = state.improves & (hoped_for > done_scores.min(axis=1))
        return _Beams(count, token, tokens, scores, done_tokens, done_scores, improves), parents


def beam_search(
    decode: Decode,
    cache: Any,
    prompt: Array,
    mask: Array,
    new_tokens: int,
    eos: Tokens,
    pad: int,
    *,
    beams: int,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    batch_axis: Any = 0,
    num_return: int = 1,
) -> tuple[Array, Array]:
    """Extend each prompt by its likeliest continuations, as far as `beams` at a time find them.

    A continuation scores the sum of its log-probabilities, divided by its length (with its `eos`)
    to the power of `length_penalty`. Made to run under jit.

    The rules are those of `generate` in transformers 5, down to the heuristics of when to stop, and
    to a continuation being done only if it ends among the best `beams` of its step. But what
    follows the end is `pad`, where transformers repeats `eos` if `pad` is 0.

    Args:
      decode: such as a model.
      cache: an empty cache with room for the longest prompt and `new_tokens` more.
      prompt: token ids, shape (B, T), int32, padded on either side.
      mask: shape (B, T), bool, False for padding.
      new_tokens: how many tokens to write at most.
      eos: a continuation ends with this token, or with any of these; None means never.
      pad: what is behind the end.
      beams: how many continuations of a row to follow.
      length_penalty: the larger, the longer; 0 compares the sums.
      early_stopping: when a row that has `beams` continuations done is finished. True: at once.
        False: once the best one under way would not be among them, if it ended here. "never": once
        it could not be, even if all tokens that follow, up to `new_tokens`, were certain.
      batch_axis: of the cache's arrays the axis of rows, or a tree of such axes, a prefix of the
        cache as `in_axes` of `jax.vmap`. Arrays whose axis is None are left as they are: `decode`
        then gets `beams` neighbouring rows of `ids` for each of theirs.
      num_return: how many continuations to return.

    Returns:
      The best continuations, shape (B, num_return, new_tokens), int32, and their scores, shape (B,
      num_return), float32, best first. Where there are fewer, the rest are `pad`, of score -inf.
    """
    _at_least_one(new_tokens=new_tokens, beams=beams, num_return=num_return)
    if num_return > beams:
        raise ValueError(f"num_return={num_return} exceeds beams={beams}")
    if early_stopping not in (False, True, "never"):
        raise ValueError(f"early_stopping must be False, True or 'never', got {early_stopping!r}")

    batch = len(prompt)
    search = _Search(new_tokens, _as_array(eos), length_penalty, early_stopping)
    cache, token, position = _read(decode, cache, prompt, mask)
    cache = _map_rows(lambda x, axis: jnp.repeat(x, beams, axis), batch_axis, cache)
    position = jnp.repeat(position, beams)

    def keep_going(carry):
        state, _ = carry
        return (state.count < new_tokens) & search.is_open(state).any()

    def extend(carry):
        state, cache = carry
        positions = (position + state.count)[:, None]
        logits, cache = decode(state.token.reshape(-1, 1), positions=positions, cache=cache)
        state, parents = search.extend(state, logits.reshape(batch, beams, -1))
        rows = (jnp.arange(batch)[:, None] * beams + parents).ravel()
        return state, _map_rows(lambda x, axis: jnp.take(x, rows, axis), batch_axis, cache)

    unwritten = jnp.full((batch, beams, new_tokens), pad, jnp.int32)
    unknown = jnp.full((batch, beams), -jnp.inf)
    start = _Beams(
        count=jnp.int32(0),
        token=jnp.repeat(token[:, None], beams, axis=1),
        tokens=unwritten,
        scores=unknown.at[:, 0].set(0.0),  # all beams are alike, and only the first shall count
        done_tokens=unwritten,
        done_scores=unknown,
        improves=jnp.ones(batch, bool),
    )
    state, _ = jax.lax.while_loop(keep_going, extend, (start, cache))
    return state.done_tokens[:, :num_return], state.done_scores[:, :num_return]


def _read(decode: Decode, cache: Any, prompt: Array, mask: Array) -> tuple[Any, Array, Array]:
    """The cache of all but the last token of each prompt; that token and its position, (B,)."""
    # Padding does not count: a model with learned positions would notice.
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    last = jnp.argmax(jnp.where(mask, positions, -1), axis=1)[:, None]
    if prompt.shape[1] > 1:
        before = mask & (positions < positions.max(axis=1, keepdims=True))
        # Nobody looks at these logits, so XLA leaves out the head: those of whole prompts would be
        # by far the largest array. The loop makes those of the last tokens.
        _, cache = decode(prompt, positions=positions, mask=before, cache=cache)
    token, position = (jnp.take_along_axis(x, last, axis=1)[:, 0] for x in (prompt, positions))
    return cache, token.astype(jnp.int32), position


def _pick(x: Array, index: Array) -> Array:
    """Of each row of `x`, (B, K, ...), what `index`, (B, J), says."""
    return x[jnp.arange(len(x))[:, None], index]


def _map_rows(function: Any, axes: Any, cache: Any) -> Any:
    """Apply `function(array, axis)` to the arrays of `cache` that have an axis of rows."""

    def apply(axis, part):
        return part if axis is None else jax.tree.map(lambda x: function(x, axis), part)

    return jax.tree.map(apply, axes, cache, is_leaf=lambda axis: axis is None)


def _as_array(tokens: Tokens) -> Array:
    return jnp.asarray(() if tokens is None else tokens, jnp.int32).reshape(-1)


def _at_least_one(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
