"""`generation` against the whole tree of what could be written."""

import itertools
import math

import draws
import extras
import jax
import jax.numpy as jnp
import numpy as np
import pytest

extras.need("examples")

from flax import nnx

from florax_examples.models.generation import beam_search, greedy
from florax_examples.models.gpt2 import GPT2, GPT2Config

VOCABULARY, NEW_TOKENS, PAD = 4, 3, 0
PROMPTS = [[2, 3, 3, 1, 2], [3, 2]]


class Recurrent:
    """A network that remembers a state, of which axis 1 is the rows', and a context for each row.

    As in T5, what is one for all beams of a row is there once.
    """

    cache_batch_axis = {"state": 1, "context": None}  # noqa: RUF012

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 5)
        shapes = (VOCABULARY, 8), (8, 8), (8, VOCABULARY), (16, 8), (len(PROMPTS), 8)
        weights = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
        self.embedding, self.recurrent, self.head, self.position, self.context = weights

    def init_cache(self, batch, length):
        return {"state": jnp.zeros((1, batch, 8)), "context": self.context}

    def __call__(self, ids, *, positions, mask=None, cache):
        mask = jnp.ones(ids.shape, bool) if mask is None else mask
        context = jnp.repeat(cache["context"], len(ids) // len(PROMPTS), axis=0)

        def step(state, column):
            ids, positions, mask = column
            inputs = self.embedding[ids] + self.position[positions] + context
            state = jnp.where(mask[:, None], jnp.tanh(state @ self.recurrent + inputs), state)
            return state, state @ self.head

        state, logits = jax.lax.scan(step, cache["state"][0], (ids.T, positions.T, mask.T))
        return logits.swapaxes(0, 1), cache | {"state": state[None]}


def gpt2():
    # Initial weights so large that attention matters and that no two scores are close.
    config = GPT2Config(VOCABULARY, 16, n_embd=8, n_layer=2, n_head=2, initializer_range=0.5)
    return draws.normal_module(lambda: GPT2(config, rngs=nnx.Rngs(0)), config.initializer_range)


def stacked_gpt2():
    model = gpt2()
    model.stack()
    return model


def padded(side):
    width = max(map(len, PROMPTS))
    ids = np.full((len(PROMPTS), width), PAD, np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, prompt in enumerate(PROMPTS):
        start = width - len(prompt) if side == "left" else 0
        own = np.s_[row, start : start + len(prompt)]
        ids[own], mask[own] = prompt, True
    return ids, mask


def writer(search, model, eos, *, new_tokens=NEW_TOKENS, **options):
    """What `search` writes for PROMPTS, given the side of the padding."""

    @jax.jit
    def write(ids, mask):
        cache = model.init_cache(len(ids), ids.shape[1] + new_tokens)
        return search(model, cache, ids, mask, new_tokens, eos, PAD, **options)

    return lambda side="left": jax.device_get(write(*padded(side)))


def beam_writer(model, eos, **options):
    return writer(beam_search, model, eos, batch_axis=model.cache_batch_axis, **options)


def tree(model):
    """All texts of NEW_TOKENS tokens, and per prompt the log-probabilities of their tokens."""
    texts = np.array(list(itertools.product(range(VOCABULARY), repeat=NEW_TOKENS)), np.int32)
    ids, mask = (np.repeat(array, len(texts), axis=0) for array in padded("left"))
    rows = np.tile(texts, (len(PROMPTS), 1))

    @jax.jit
    def log_probs(ids, mask):
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        cache = model.init_cache(*ids.shape)
        logits, _ = model(ids, positions=positions, mask=mask, cache=cache)
        logits = jax.nn.log_softmax(logits[:, -NEW_TOKENS - 1 : -1])
        return jnp.take_along_axis(logits, rows[..., None], axis=-1)[..., 0]

    mask = np.concatenate([mask, np.ones(rows.shape, bool)], axis=1)
    values = log_probs(np.concatenate([ids, rows], axis=1), mask)
    return texts, np.asarray(values).reshape(len(PROMPTS), *texts.shape)


def in_order(texts, log_probs, eos, length_penalty):
    """All texts up to their first `eos` with their scores, best first."""
    ends = np.isin(texts, eos)
    lengths = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, NEW_TOKENS)
    scores = {}
    for text, own, length in zip(texts, log_probs, lengths, strict=True):
        tokens = (*text[:length], *[PAD] * (NEW_TOKENS - length))
        scores[tokens] = own[:length].sum() / length**length_penalty
    return sorted(scores.items(), key=lambda item: -item[1])


@pytest.fixture(scope="module")
def recurrent():
    model = Recurrent()
    return model, *tree(model)


def check_all_texts(model, texts, log_probs, eos, length_penalty):
    expected = [in_order(texts, own, eos, length_penalty) for own in log_probs]
    found = len(expected[0])
    beams = found + 3  # more than there are texts
    options = dict(beams=beams, num_return=beams, length_penalty=length_penalty)
    tokens, scores = beam_writer(model, eos or None, **options)()
    for row, pairs in enumerate(expected):
        assert [tuple(text) for text in tokens[row, :found]] == [text for text, _ in pairs]
        np.testing.assert_allclose(scores[row, :found], [score for _, score in pairs], rtol=2e-6)
    assert (scores[:, found:] == -np.inf).all()
    assert (tokens[:, found:] == PAD).all()


@pytest.mark.slow
@pytest.mark.parametrize("make_model", [Recurrent, gpt2, stacked_gpt2])
def test_as_many_beams_as_there_are_texts_find_all_in_order(make_model):
    model = make_model()
    check_all_texts(model, *tree(model), (1,), 2.0)


@pytest.mark.parametrize(
    ("eos", "penalty"), [pytest.param((), 1.0, marks=pytest.mark.slow), ((1, 3), -1.0)]
)
def test_texts_end_with_any_eos_and_count_by_their_length(recurrent, eos, penalty):
    check_all_texts(*recurrent, eos, penalty)


@pytest.mark.parametrize("eos", [None, 1, (1, 3)])
def test_greedy_writes_the_likeliest_token_and_pads_what_is_done(recurrent, eos):
    model, texts, log_probs = recurrent
    expected = []
    for own in log_probs:
        likeliest = np.ones(len(texts), bool)
        for i in range(NEW_TOKENS):
            likeliest &= own[:, i] == np.max(own[:, i], where=likeliest, initial=-np.inf)
        (text,) = texts[likeliest]
        ends = np.isin(text, () if eos is None else eos)
        expected.append(np.where(np.cumsum(ends) - ends > 0, PAD, text))
    np.testing.assert_array_equal(writer(greedy, model, eos)(), expected)


def test_one_beam_that_stops_at_once_is_greedy():
    options = dict(eos=1, new_tokens=8)
    tokens, _ = beam_writer(Recurrent(), beams=1, early_stopping=True, **options)()
    np.testing.assert_array_equal(tokens[:, 0], writer(greedy, Recurrent(), **options)())


@pytest.mark.slow
def test_the_side_of_the_padding_changes_nothing(recurrent):
    model, *_ = recurrent
    write = beam_writer(model, 1, beams=3, num_return=2)
    (left, left_scores), (right, right_scores) = write("left"), write("right")
    np.testing.assert_array_equal(left, right)
    np.testing.assert_allclose(left_scores, right_scores, rtol=2e-6)
    assert left.shape == (len(PROMPTS), 2, NEW_TOKENS)
    write = writer(greedy, model, None)
    np.testing.assert_array_equal(write("left"), write("right"))


def search_table(steps, eos, new_tokens, **options):
    """The texts found where `steps` has each step's probabilities, whatever stands before."""

    def decode(ids, *, positions, cache, mask=None):
        return jnp.log(jnp.array(steps))[positions], cache

    @jax.jit
    def search(prompt, mask):
        return beam_search(decode, (), prompt, mask, new_tokens, eos, pad, **options)

    pad = -1
    found = search(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))
    texts, scores = (array[0].tolist() for array in found)
    return {tuple(x for x in text if x != pad): s for text, s in zip(texts, scores, strict=True)}


@pytest.mark.parametrize(
    ("early_stopping", "expected"),
    [
        # Two texts are done after two steps: [1], of 0.5, and [0, 1], of 0.3 * 0.45.
        (True, {(1,): 0.5, (0, 1): 0.3 * 0.45}),
        # But [0, 0], of 0.3 * 0.5, is better than the second, and goes on to [0, 0, 1].
        (False, {(0, 0, 1): 0.3 * 0.5 * 0.9, (1,): 0.5}),
        # What begins with [0, 0, 0] is worse by then, but not if its sum were of eight tokens.
        ("never", {(0,) * 8: 0.3 * 0.5 * 0.1 * 0.99**5, (2, *[0] * 7): 0.2 * 0.5 * 0.1 * 0.99**5}),
    ],
)
def test_a_search_stops_when_it_is_told_to(early_stopping, expected):
    steps = [[0.3, 0.5, 0.2], [0.5, 0.45, 0.05], [0.1, 0.9, 0], *[[0.99, 0.01, 0]] * 5]
    found = search_table(steps, 1, 8, beams=2, num_return=2, early_stopping=early_stopping)
    assert list(found) == list(expected)
    log_means = [math.log(value) / len(text) for text, value in expected.items()]
    np.testing.assert_allclose(list(found.values()), log_means, rtol=2e-6)


def test_a_search_goes_on_if_the_likeliest_tokens_all_end_a_text():
    steps = [[0.1, 0.5, 0.4], *[[1.0, 0.0, 0.0]] * 3]
    found = search_table(steps, (1, 2), 4, beams=1, early_stopping="never")
    assert list(found) == [(0, 0, 0, 0)]


@pytest.mark.slow
def test_a_long_prompt_never_has_its_logits():
    batch, length, vocabulary = 4, 100, 5000
    config = GPT2Config(vocabulary, length + 1, n_embd=8, n_layer=1, n_head=1)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: GPT2(config, rngs=nnx.Rngs(0))))

    @jax.jit
    def run(params, ids):
        model = nnx.merge(graphdef, params)
        cache = model.init_cache(batch, length + 1)
        return greedy(model, cache, ids, jnp.ones(ids.shape, bool), 1, None, PAD)

    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    compiled = run.lower(params, ids).compile()
    last_logits = batch * vocabulary * 4  # bytes
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * last_logits


def test_searches_refuse_impossible_settings():
    def refused(message, search, new_tokens=3, **options):
        with pytest.raises(ValueError, match=message):
            search(None, None, np.zeros((1, 1)), np.ones((1, 1)), new_tokens, 1, 0, **options)

    refused("new_tokens must be at least 1, got 0", greedy, 0)
    refused("new_tokens must be at least 1, got 0", beam_search, 0, beams=2)
    refused("beams must be at least 1, got 0", beam_search, beams=0)
    refused("num_return must be at least 1, got 0", beam_search, beams=2, num_return=0)
    refused("num_return=3 exceeds beams=2", beam_search, beams=2, num_return=3)
    refused("early_stopping must be .* got 'always'", beam_search, beams=2, early_stopping="always")
