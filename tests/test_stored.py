"""Numbers in few bits: rounded fairly, packed as described, and as near as a scale allows."""

import math

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_array_equal

import florax
from florax import _stored

INTEGERS = {8: jnp.int8, 4: jnp.int4, 2: jnp.int2}


ALL_BITS = pytest.mark.parametrize("bits", INTEGERS)
BY_DAY_8 = pytest.mark.parametrize(
    "bits", [8, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (4, 2))]
)
# Products of float32 and their sums with noise, below 128: three roundings of 2⁻²⁴ each of at most
# 127, and one of half of the 2⁻¹⁷ between such numbers; together less than 2⁻¹⁵ of a unit.
INEXACT = 2.0**-15


def keys(seed, count):
    return jax.random.bits(jax.random.key(seed), (count, 2), jnp.uint32)


def key(seed):
    return keys(seed, 1)[0]


def normal(seed, *shape):
    """Of several magnitudes: two neighbours may be far apart."""
    own, magnitudes = np.asarray(draws.normal(seed, 2, *shape))
    return jnp.asarray(own * np.exp(2 * magnitudes))


def zeros(shape, bits):
    return _stored.zeros(shape, INTEGERS[bits], jnp.zeros([]), ())


@jax.jit
def write(like, value, key, rows=None):
    return _stored.write(like, value, key, rows)


read = jax.jit(_stored.read)


def stored(value, bits, seed=0):
    return write(zeros(value.shape, bits), value, key(seed))


# --- the same in NumPy, from the descriptions


def mixed(word):
    """Wellons' lowbias32, in 64 bits and cut to 32."""
    word = np.asarray(word, np.uint64)
    word = (word ^ (word >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    word = (word ^ (word >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return word ^ (word >> 16)


def noise(key, rows, width):
    row = mixed(mixed(np.asarray(rows, np.uint64) ^ int(key[0])) ^ int(key[1]))
    return (mixed(np.arange(width) ^ row[:, None].astype(int)) >> 8) / 2.0**24


def geometry(shape, bits):
    """Rows, entries in each, blocks in each, and words in a block."""
    count = min(1, len(shape))
    while count < len(shape) and math.prod(shape[len(shape) - count :]) < 32:
        count += 1
    lead = len(shape) - count
    size = math.prod(shape[lead:])
    blocks = math.ceil(size / 64)
    words = math.ceil(math.ceil(size / blocks) * bits / 32) if blocks else 0
    return math.prod(shape[:lead]), size, blocks, words


def block_of_each(shape, bits):
    """Numbers of the rows and blocks that the entries are in, of the array's shape."""
    rows, size, blocks, words = geometry(shape, bits)
    own = np.arange(size) // max(words * 32 // bits, 1)
    return (np.arange(rows)[:, None] * blocks + own).reshape(shape)


def scale_of_each(array):
    """The scale of the block that each entry is in."""
    return np.asarray(array.scales).ravel()[block_of_each(array.shape, array.bits)]


def unpack(array):
    """The integers, by row, block and place, those that fill up the last block included."""
    rows, _, blocks, words = geometry(array.shape, array.bits)
    packed = np.asarray(array.words).reshape(rows, blocks, 1, words).astype(np.int64)
    shifts = np.arange(0, 32, array.bits)[:, None]
    integers = (packed >> shifts) & (2**array.bits - 1)
    signed = np.where(integers >= 2 ** (array.bits - 1), integers - 2**array.bits, integers)
    return signed.reshape(rows, blocks, words * 32 // array.bits)


SHAPES = [
    *[(), (1,), (3,), (31,), (33,), (37,), (63,), (64,), (65,), (100,), (129,)],
    *[(1, 1), (1, 70), (70, 1), (2, 1, 40), (7, 33), (5, 7, 4), (3, 3, 16, 16), (4, 3, 2)],
]
EMPTY = [(0,), (0, 5), (5, 0), (0, 70), (70, 0), (2, 0, 64)]


def levels(bits):
    """All that an integer can stand for, from the lowest, in scales."""
    if bits == 8:
        return np.arange(-127.0, 128)
    step = np.arange(-7.0, 8) if bits == 4 else np.array([-3.0, -1, 1, 3])
    return 4 / 7 * step + 3 / 7 * step**3 / step[-1] ** 2


LOWEST = {8: -127, 4: -7, 2: -2}  # integers


def neighbours(value, scale, bits):
    """Of each entry the number of the level below it, the two levels, and its place in between."""
    quotient = np.divide(value, scale, where=scale > 0, out=np.zeros(np.shape(value)))
    all_of_them = levels(bits)
    number = np.clip(
        np.searchsorted(all_of_them, quotient, side="right") - 1, 0, len(all_of_them) - 2
    )
    below, above = all_of_them[number], all_of_them[number + 1]
    return number, below, above, (quotient - below) / (above - below)


def by_day(shape, bits):
    """By night all combinations."""
    shapes = [*SHAPES, *EMPTY]
    return shape in [(65,), (5, 7, 4)] or shapes.index(shape) % 6 == bits.bit_length() - 2


def every(*shapes):
    return pytest.mark.parametrize(
        "shape, bits",
        [
            pytest.param(shape, bits, marks=() if by_day(shape, bits) else pytest.mark.slow)
            for shape in shapes
            for bits in INTEGERS
        ],
        ids=str,
    )


@every(*SHAPES)
def test_words_and_scales_are_those_of_the_description(bits, shape):
    value = normal(1, *shape)
    array = stored(value, bits, seed=2)
    rows, size, blocks, words = geometry(shape, bits)
    per_block = words * 32 // bits
    padded = np.zeros((rows, blocks * per_block), np.float32)
    padded[:, :size] = np.reshape(value, (rows, size))
    entries = padded.reshape(rows, blocks, per_block)
    scales = abs(entries).max(-1) * np.float32(1 / levels(bits)[-1])
    assert_array_equal(np.reshape(array.scales, scales.shape), scales)
    own_noise = noise(key(2), np.arange(rows), padded.shape[1]).reshape(entries.shape)
    spread = np.broadcast_to(scales[..., None], entries.shape)
    number, _, _, place = neighbours(entries.astype(np.float64), spread, bits)
    integers = LOWEST[bits] + number + (own_noise < place)
    decided = (abs(place - own_noise) > INEXACT) & (place > INEXACT) & (place < 1 - INEXACT)
    assert_array_equal(unpack(array)[decided], integers[decided])
    assert abs(unpack(array) - integers).max() <= 1
    assert decided.mean() > 0.7 or size < 20
    own = unpack(array).reshape(rows, -1)[:, :size].reshape(shape)
    exact = levels(bits)[own - LOWEST[bits]] * scale_of_each(array)
    # A polynomial of three products and a sum, times the scale.
    np.testing.assert_allclose(read(array), exact, rtol=6 * 2**-24)


@every(*SHAPES, *EMPTY)
def test_what_is_read_has_the_shape_and_is_a_neighbour(bits, shape):
    value = normal(3, *shape)
    array = stored(value, bits)
    assert array.shape == shape and array.ndim == len(shape) and array.dtype == INTEGERS[bits]
    got = read(array)
    assert got.shape == shape and got.dtype == jnp.float32
    error, scale = abs(np.asarray(got, np.float64) - value), scale_of_each(array)
    _, below, above, _ = neighbours(np.asarray(value, np.float64), scale, bits)
    assert np.all(error <= (above - below) * scale * (1 + INEXACT))
    assert bits != 8 or np.all(error <= scale * (1 + INEXACT))
    assert_array_equal(read(zeros(shape, bits)), np.zeros(shape))


@every(*SHAPES, *EMPTY)
def test_bytes_are_four_for_every_word_and_every_scale(bits, shape):
    array = zeros(shape, bits)
    rows, size, blocks, words = geometry(shape, bits)
    assert array.words.nbytes + array.scales.nbytes == 4 * rows * blocks * (words + 1)
    # The last word of a block may be filled up: then with less than another word.
    assert 8 * 4 * words * blocks >= bits * size
    assert not blocks or (words - 1) * 32 / bits < size / blocks + 1


@pytest.mark.parametrize("bits, share", [(8, 8.5), (4, 4.5), (2, 2.5)])
def test_of_blocks_of_64_half_a_bit_is_for_the_scale(bits, share):
    array = zeros((10, 640), bits)
    assert 8 * (array.words.nbytes + array.scales.nbytes) == share * 6400


# --- fair


@ALL_BITS
def test_rounding_is_unbiased_with_the_variance_of_a_coin(bits):
    count = 4000
    value, like = normal(4, 2, 100), zeros((2, 100), bits)
    many = jax.vmap(lambda own: read(write(like, value, own)))(keys(5, count))
    errors = np.asarray(many, np.float64) - np.asarray(value, np.float64)
    scale = scale_of_each(stored(value, bits))
    _, below, above, part = neighbours(np.asarray(value, np.float64), scale, bits)
    part, gap = np.clip(part, 0, 1), (above - below) * scale
    # An entry is one of two neighbours: p(1 − p) of the square of what is between them. By
    # Bernstein's inequality beyond five standard errors, and 25/3 of a single error for those that
    # are rare, once in 130,000 entries.
    standard_error = gap * np.sqrt(part * (1 - part) / count)
    rare = 25 / 3 / count + INEXACT
    assert np.all(abs(errors.mean(0)) < 5 * standard_error + rare * gap)
    assert abs(errors / gap).max() < 1 + INEXACT


@ALL_BITS
def test_what_needs_no_rounding_is_kept_whatever_the_key(bits):
    """The largest of a block is the highest level, so the scale is the same again."""
    count = 2000
    array = stored(normal(6, 3, 100), bits)
    again = jax.vmap(lambda own: write(array, read(array), own))(keys(7, count))
    np.testing.assert_array_max_ulp(
        np.asarray(again.scales), np.broadcast_to(array.scales, again.scales.shape), 1
    )
    moved = jax.vmap(read)(again) - read(array)
    # But for what float32 leaves open of the quotient: once in 2¹⁵, by one integer.
    is_moved = abs(moved) > scale_of_each(array) / 4
    chance = INEXACT if bits == 8 else INEXACT / 2 ** (8 - bits)
    assert is_moved.sum() <= chance * moved.size + 5 * math.sqrt(chance * moved.size)
    assert np.all(abs(moved) <= max(np.diff(levels(bits))) * scale_of_each(array) * (1 + INEXACT))


@pytest.mark.parametrize("bits, even, expected", [(4, 7, 0.82), (2, 1, 0.42)])
def test_levels_closer_near_zero_round_with_less_noise_than_even_ones(bits, even, expected):
    """The expected square of an error is the product of the distances to both neighbours."""
    value = np.asarray(draws.normal(13, 4000, 64))
    errors = np.asarray(read(stored(value, bits)), np.float64) - value
    largest = abs(value).max(1, keepdims=True)
    part = value / largest * even % 1
    noise = (part * (1 - part) * (largest / even) ** 2).mean()
    assert abs((errors**2).mean() / noise - expected) < 0.01


@BY_DAY_8
def test_the_largest_of_a_block_is_never_rounded(bits):
    value = jnp.ones((1, 64)).at[0, 7].set(-3.0)
    for seed in range(20):
        np.testing.assert_allclose(read(stored(value, bits, seed))[0, 7], -3, rtol=2**-22)


def test_every_entry_and_every_row_has_noise_of_its_own():
    own = np.asarray(_stored._noise(key(0), jnp.arange(50, dtype=jnp.uint32), 200))
    assert own.min() >= 0 and own.max() < 1
    # Means of 10,000 and of their products: standard errors 1/√12 and 1/12, over 100.
    assert abs(own.mean() - 0.5) < 5 / math.sqrt(12) / 100
    for a, b in [(own[1:], own[:-1]), (own[:, 1:], own[:, :-1])]:
        assert abs(((a - 0.5) * (b - 0.5)).mean()) < 5 / 12 / 98
    other = np.asarray(_stored._noise(key(1), jnp.arange(50, dtype=jnp.uint32), 200))
    assert abs(((own - 0.5) * (other - 0.5)).mean()) < 5 / 12 / 100


# --- averages


@pytest.mark.parametrize(
    "rank, bits",
    [
        pytest.param(None, 8, id="full size-8"),
        pytest.param(4, 4, id="sketch-4", marks=pytest.mark.slow),
        pytest.param(None, 4, id="full size-4", marks=pytest.mark.slow),
        pytest.param(4, 8, id="sketch-8", marks=pytest.mark.slow),
    ],
)
def test_a_slow_average_of_a_constant_reaches_it(bits, rank):
    """Rounded to the nearest it would stay where it was: its increments are a thousandth."""
    grads = normal(8, *((5, 60) if rank is None else (75, 40)))
    tx = florax.flora_momentum(
        lambda path, leaf: rank, 0.999, resample_every=10**6, accumulator_dtype=INTEGERS[bits]
    )
    state = tx.init(grads)
    (wanted,) = state.sketch.compress([grads])
    # From their negatives, all but the largest of the blocks: the scales are there at once.
    scale = scale_of_each(stored(wanted, bits))
    *_, last, highest = levels(bits)
    start = jnp.where(abs(wanted) > (1.1 * last - 0.1 * highest) * scale, wanted, -wanted)
    like = write(state.sketch.arrays, start, key(0))

    @jax.jit
    def run(state):
        def update(state, _):
            return tx.update(grads, state)[1], None

        return jax.lax.scan(update, state, None, length=10_000)[0]

    kept = run(state._replace(sketch=state.sketch.replace([like]))).sketch.arrays
    errors = (np.asarray(read(kept), np.float64) - wanted) / scale_of_each(kept)
    # What is left of the start is 0.999^10,000 < 5e-5, of at most 2 · 127 scales. An entry then is
    # one of the two neighbours of its limit: it leaves the one for the other with a thousandth of
    # its distance from it, so it is there with the chances of a coin that is right on average.
    left = 2 * 127 * 0.999**10_000
    _, below, above, part = neighbours(np.asarray(wanted, np.float64), scale, bits)
    part, gap = np.clip(part, 0, 1), above - below
    assert np.all(abs(errors) < gap * (1 + INEXACT) + left)
    variance = (part * (1 - part) * gap**2).mean() / wanted.size
    assert abs(errors.mean()) < 5 * math.sqrt(variance) + left


def test_100_000_steps_do_not_drift():
    """Every step rounds; the mean of what is kept stays that of the gradients."""
    grads, count, decay = normal(9, 40), 50_000, 0.9
    tx = florax.flora_momentum(lambda path, leaf: None, decay, accumulator_dtype=jnp.int8)

    @jax.jit
    def run(state):
        def update(carry, t):
            state, total = carry
            # ± alternately: there is something to be rounded at every entry and step.
            _, state = tx.update(grads * (1 + jnp.where(t % 2, 0.5, -0.5)), state)
            return (state, total + (_stored.read(state.sketch.arrays) - grads)), None

        def update_twice(state, total):
            return jax.lax.scan(update, (state, total), jnp.arange(count))[0]

        state, _ = update_twice(state, jnp.zeros_like(grads))
        return update_twice(state, jnp.zeros_like(grads))

    state, total = run(tx.init(grads))
    scale = scale_of_each(state.sketch.arrays)
    # A rounding errs with a variance of at most a quarter of the scale's square, and the average
    # keeps 1/(1 − β) of every error in all. The scale varies by a twentieth with the alternation.
    standard_error = scale * 1.1 * 0.5 / (1 - decay) / math.sqrt(count)
    assert np.all(abs(np.asarray(total) / count) < 5 * standard_error)


# --- numbers out of the ordinary


@ALL_BITS
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, -1e30])
def test_tiny_and_huge_numbers_are_kept(bits, value):
    got = np.asarray(read(stored(jnp.full((2, 70), value), bits)))
    # All are the largest of their block.
    np.testing.assert_allclose(got, np.full((2, 70), value), rtol=2**-22)


@ALL_BITS
@pytest.mark.parametrize("value", [1e-40, -1e-40, 1e-45])
def test_what_is_below_normal_numbers_becomes_zero(bits, value):
    assert_array_equal(read(stored(jnp.full((2, 70), value), bits)), np.zeros((2, 70)))


@ALL_BITS
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_makes_its_block_nan_and_no_other(bits, value):
    like = normal(10, 3, 200)
    array = stored(like.at[1, 70].set(value), bits)
    expected = block_of_each((3, 200), bits) == block_of_each((3, 200), bits)[1, 70]
    assert 0 < expected.sum() <= 64
    assert_array_equal(np.isnan(read(array)), expected)
    assert_array_equal(read(array)[~expected], read(stored(like, bits))[~expected])


def test_a_block_that_was_nan_is_finite_once_it_is_written_again():
    value = normal(11, 200)
    array = write(stored(value.at[5].set(jnp.nan), 8), value, key(0))
    assert_array_equal(read(array), read(stored(value, 8)))


@BY_DAY_8
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_16_bit_values_are_written_as_the_same_numbers_in_float32(bits, dtype):
    value = jnp.clip(normal(12, 3, 70), -100, 100).astype(dtype)
    array, wide = stored(value, bits), stored(value.astype(jnp.float32), bits)
    assert_array_equal(array.words, wide.words)
    assert_array_equal(array.scales, wide.scales)


# --- the same bits wherever it is done


def assert_same_bits(a, b):
    assert_array_equal(a.words, b.words)
    assert_array_equal(a.scales, b.scales)
    assert (a.trail, a.bits) == (b.trail, b.bits)


@BY_DAY_8
@pytest.mark.parametrize("shape", [pytest.param((), marks=pytest.mark.slow), (7, 129)], ids=str)
def test_jit_changes_no_bits(bits, shape, optimized):
    value, like = normal(13, *shape), zeros(shape, bits)
    one_by_one = _stored.write(like, value, key(3))
    assert_same_bits(jax.jit(_stored.write)(like, value, key(3)), one_by_one)
    assert_array_equal(jax.jit(_stored.read)(one_by_one), _stored.read(one_by_one))


@BY_DAY_8
@pytest.mark.parametrize("shape", [(), (7, 129), (5, 7, 4)], ids=str)
def test_a_stack_under_vmap_is_written_as_its_members_are(bits, shape):
    values, like, own = normal(14, 3, *shape), zeros(shape, bits), keys(15, 3)
    likes = jax.tree.map(lambda x: jnp.stack([x] * 3), like)
    together = jax.vmap(write)(likes, values, own)
    arrays = jax.vmap(read)(together)
    for i in range(3):
        alone = write(like, values[i], own[i])
        assert_same_bits(jax.tree.map(lambda x, i=i: x[i], together), alone)
        assert_array_equal(arrays[i], read(alone))


@BY_DAY_8
@pytest.mark.parametrize("shape", [(4, 3, 70), (4, 5, 8, 5)], ids=str)
def test_a_part_written_with_its_rows_has_the_bits_of_the_whole(bits, shape):
    value, like = normal(16, *shape), zeros(shape, bits)
    whole = write(like, value, key(4))
    rows = _stored.row_numbers(like)
    for part in (slice(1, 2), slice(2, 4)):
        own = jax.tree.map(lambda x, part=part: x[part], like)
        assert_same_bits(
            write(own, value[part], key(4), rows[part]),
            jax.tree.map(lambda x, part=part: x[part], whole),
        )


@BY_DAY_8
def test_a_multiple_is_that_of_the_scales(bits):
    array = stored(normal(17, 3, 70), bits)
    double = _stored.scaled(lambda x: 2 * x, array)
    assert_array_equal(double.words, array.words)
    assert_array_equal(read(double), 2 * read(array))


# --- which numbers there are


def accumulate(rank, **arguments):
    return florax.flora_accumulate(optax.sgd(0.1), 2, rank, **arguments)


REFUSED = [jnp.uint8, jnp.uint4, jnp.int16, jnp.int32, bool, jnp.complex64, jnp.float8_e4m3fn]


@pytest.mark.parametrize(
    "make", [florax.flora_momentum, accumulate], ids=["momentum", "accumulate"]
)
@pytest.mark.parametrize("dtype", [*REFUSED, "nonsense", 8], ids=str)
def test_other_dtypes_are_refused_and_the_fix_is_named(make, dtype):
    with pytest.raises(TypeError, match=r"accumulator_dtype must be .*jnp\.int8.*got.*take jnp"):
        make(4, accumulator_dtype=dtype)


@pytest.mark.parametrize("dtype", [jnp.int8, "int8", np.int8, np.dtype("int8"), "int4", "int2"])
def test_integers_may_be_named_in_any_way(dtype):
    kept = florax.flora_momentum(4, accumulator_dtype=dtype).init(jnp.zeros((9, 9))).sketch.arrays
    assert kept.dtype == jnp.dtype(dtype)


# --- floats of 16 bits


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("value", [1.001, -1.001, 0.3, -123.4, 1e-3])
def test_stochastic_rounding_is_right_on_average(dtype, value):
    values = jnp.full(20_000, value, jnp.float32)
    rounded = np.asarray(_stored.stochastic_round(values, dtype, key(0)), np.float64)
    assert len(set(rounded)) == 2  # the two neighbours
    low, high = sorted(set(rounded))
    chance = (values[0] - low) / (high - low)
    standard_error = (high - low) * math.sqrt(chance * (1 - chance) / len(values))
    assert abs(rounded.mean() - float(values[0])) < 5 * standard_error


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_stochastic_rounding_keeps_what_needs_no_rounding(dtype):
    exact = jnp.array([0.0, -0.0, 1.0, -1.5, jnp.inf, -jnp.inf, jnp.nan, jnp.finfo(dtype).max])
    for seed in range(5):
        rounded = _stored.stochastic_round(exact.astype(jnp.float32), dtype, key(seed))
        assert_array_equal(np.asarray(rounded, np.float32), np.asarray(exact, np.float32))
