"""Losses that use weights in every way that a gradient can, or cannot, be born compressed through.

Sizes are chosen so that no activation, sketch or projection has as many entries as a weight.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import draws
import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core
from jax.interpreters import ad, mlir

import florax
from florax import FloraDimensionNumbers as Axes

TOKENS, WIDTH, INNER, LAYERS, RANK = 5, 11, 13, 3, 4
STACK = Axes(rows=1, columns=2, batch=0)


class Case(NamedTuple):
    """A loss and what it is called with.

    Attributes:
      loss: of the parameters and the batch.
      params: a tree.
      batch: the other arguments.
      dense: by path, the operation whose own gradient is dense for a moment.
      axes: by name, how a parameter is seen; for others: three axes are a stack.
      eps: of the narrowest type in which a gradient is computed.
      exact: whether dense gradients are computed by the same operations in the same order.
      terms: of the sums over what the weights meet: tokens, or positions.
    """

    loss: Callable[..., Any]
    params: Any
    batch: tuple[Any, ...]
    dense: Mapping[str, str] = {}
    axes: Mapping[str, Axes] = {}
    eps: float = float(jnp.finfo(jnp.float32).eps)
    exact: bool = True
    terms: int = TOKENS

    def transformation(self, **arguments: Any) -> optax.GradientTransformationExtraArgs:
        return florax.flora_accumulate(
            **{"opt": optax.sgd(0.1), "every_k_schedule": 2, "rank": RANK, **arguments},
            dimension_numbers=self.dimension_numbers,
        )

    def dimension_numbers(self, path: Any, leaf: Any) -> Axes | None:
        names = jax.tree_util.keystr(path)
        named = [axes for name, axes in self.axes.items() if f"['{name}']" in names]
        if named and named[0] is not None and leaf.ndim < 3:
            return None  # the bias beside a kernel
        return named[0] if named else STACK if leaf.ndim == 3 else None


CASES: dict[str, Callable[[], Case]] = {}


def case(function: Callable[[], Case]) -> Callable[[], Case]:
    CASES[function.__name__] = functools.cache(function)
    return CASES[function.__name__]


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    """Of size 1 / sqrt(first axis but a stack's), so that activations keep theirs."""
    scale = 1 / np.sqrt(shape[-2] if len(shape) > 1 else 1)
    return draws.normal((seed, *shape), *shape, scale=scale, dtype=dtype)


def tokens(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return draws.normal(7, *shape, TOKENS, WIDTH, dtype=dtype)


def matrices(**arguments: Any) -> dict[str, jax.Array]:
    return {"up": normal(WIDTH, INNER, **arguments), "down": normal(INNER, WIDTH, **arguments)}


def stacks(*stack: int) -> dict[str, jax.Array]:
    return {"up": normal(*stack, WIDTH, INNER), "down": normal(*stack, INNER, WIDTH)}


def block(x: jax.Array, w: Any) -> jax.Array:
    """A feed-forward network with its skip connection."""
    return x + jnp.tanh(x @ w["up"]) @ w["down"]


def size(x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(x.astype(jnp.float32)))


# --- products


@case
def a_plain_function() -> Case:
    def loss(params, x):
        return size(block(x, params) + params["bias"])

    return Case(loss, {**matrices(), "bias": normal(WIDTH)}, (tokens(2),))


@case
def weights_on_the_left() -> Case:
    def loss(params, x):
        return size(params["down"].T @ jnp.tanh(params["up"].T @ x.T))

    return Case(loss, matrices(), (tokens(),))


@case
def a_matrix_by_a_vector() -> Case:
    def loss(params, x):
        return size(jnp.tanh(x[0] @ params["up"]) @ params["down"])

    return Case(loss, matrices(), (tokens(),))


@case
def a_tied_weight() -> Case:
    def loss(params, x):
        return size(jnp.tanh(x @ params["up"]) @ params["up"].T @ params["down"].T)

    return Case(loss, matrices(), (tokens(),))


@case
def an_embedding_and_its_tied_head() -> Case:
    """Rows that are looked up twice, from the end, and out of range, where none is."""
    vocabulary = 3 * WIDTH

    def loss(params, x):
        ids = jnp.array([[1, 5, 1], [-1, 0, 10 * vocabulary]])
        looked_up = params["embed"].at[ids].get(mode="fill", fill_value=0.0)
        looked_up = looked_up + jnp.take(params["embed"], ids[0], axis=0)
        return size(jnp.tanh(looked_up) @ params["embed"].T) + size(params["beside"][ids[0, 0]] * x)

    params = {"embed": normal(vocabulary, WIDTH), "beside": normal(vocabulary, WIDTH)}
    return Case(loss, params, (tokens(),))


@case
def convolutions_whose_windows_tile_their_input() -> Case:
    """Products with patches, as in a vision transformer; and with single pixels."""

    def loss(params, x):
        images = jnp.tanh(x.reshape(2, 4, 6, 3))
        patches = jax.lax.conv_general_dilated(
            images, params["patch"], (2, 3), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        pixels = jax.lax.conv_general_dilated(
            patches.transpose(0, 3, 1, 2),
            params["pixel"],
            (1, 1),
            "SAME",
            dimension_numbers=("NCHW", "OIHW", "NHCW"),
        )
        return size(jnp.tanh(pixels))

    params = {"patch": normal(2, 3, 3, INNER), "pixel": normal(WIDTH, INNER, 1, 1)}
    axes = {
        "patch": Axes(rows=(0, 1, 2), columns=3),
        "pixel": Axes(rows=0, columns=(1, 2, 3)),
    }
    images = draws.normal(7, 2, 4 * 6 * 3)
    return Case(loss, params, (images,), axes=axes)


@case
def attention_kernels_of_three_axes() -> Case:
    def loss(params, x):
        q, k, v = (jnp.einsum("td,dhk->thk", x, params[name]) for name in ("q", "k", "v"))
        mixed = jax.nn.dot_product_attention(q[None], k[None], v[None])
        return size(jnp.einsum("bthk,hkd->btd", mixed, params["out"]))

    kernels = {name: normal(WIDTH, 2, 7, seed=i) for i, name in enumerate(("q", "k", "v"))}
    axes = {**dict.fromkeys(kernels, Axes(0, (1, 2))), "out": Axes((0, 1), 2)}
    return Case(loss, {**kernels, "out": normal(2, 7, WIDTH)}, (tokens(),), axes=axes)


@case
def grouped_heads_of_four_axes() -> Case:
    def loss(params, x):
        return size(jnp.einsum("td,dghk->gthk", x, params["q"]))

    axes = {"q": Axes(0, (1, 2, 3))}
    return Case(loss, {"q": normal(WIDTH, 3, 2, 7)}, (tokens(),), axes=axes)


@case
def heads_merged_and_split() -> Case:
    def loss(params, x):
        heads = (x @ params["split"]).reshape(-1, 2, 7)
        split = jnp.einsum("td,dhk->thk", x, params["split"].reshape(WIDTH, 2, 7))
        merged = x @ params["merged"].reshape(WIDTH, 14)
        rows = jnp.einsum("thk,hkd->td", heads, params["rows"].reshape(2, 7, WIDTH))
        return size(split) + size(merged) + size(rows)

    params = {
        "split": normal(WIDTH, 14),
        "merged": normal(WIDTH, 2, 7),
        "rows": normal(14, WIDTH),
    }
    return Case(loss, params, (tokens(),), axes={"merged": Axes(0, (1, 2))})


@case
def a_fused_weight_cut_in_columns_and_in_rows() -> Case:
    def loss(params, x):
        q, k, v = jnp.split(params["columns"], 3, axis=1)
        first, second = params["rows"][:4], params["rows"][4:]
        return size(x @ q) + size((x @ k) * (x @ v)) + size(x[:, :4] @ first + x[:, 4:] @ second)

    return Case(loss, {"columns": normal(WIDTH, 21), "rows": normal(WIDTH, INNER)}, (tokens(),))


@case
def a_part_that_is_used_alone() -> Case:
    def loss(params, x):
        return size(x @ params["up"][:, 2:9])

    return Case(loss, {"up": normal(WIDTH, INNER)}, (tokens(),))


@case
def transposed_before_it_is_stored() -> Case:
    """`(out, in)`, as PyTorch keeps it."""

    def loss(params, x):
        return size(jnp.swapaxes(params["w"], 0, 1).T @ x.T) + size(x @ params["w"].T)

    return Case(loss, {"w": normal(INNER, WIDTH)}, (tokens(),))


@case
def a_weight_that_is_not_used() -> Case:
    def loss(params, x):
        return size(x @ params["up"])

    return Case(loss, matrices(), (tokens(),))


@case
def a_gradient_inside_of_the_loss() -> Case:
    def energy(x, params):
        return jnp.sum(jnp.tanh(x @ params["up"]) @ params["down"])

    def loss(params, x):
        return size(jax.grad(energy)(x, params))

    return Case(loss, matrices(), (tokens(),))


# --- types


@case
def bfloat16_activations_of_float32_weights() -> Case:
    def loss(params, x):
        half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
        return size(block(x.astype(jnp.bfloat16), half))

    return Case(loss, matrices(), (tokens(),), eps=float(jnp.finfo(jnp.bfloat16).eps))


@case
def bfloat16_weights() -> Case:
    def loss(params, x):
        product = jnp.matmul(x, params["up"], preferred_element_type=jnp.float32)
        return size(product.astype(jnp.bfloat16) @ params["down"])

    eps = float(jnp.finfo(jnp.bfloat16).eps)
    batch = (tokens(dtype=jnp.bfloat16),)
    return Case(loss, matrices(dtype=jnp.bfloat16), batch, eps=eps)


@case
def bfloat16_weights_in_a_float32_program() -> Case:
    def loss(params, x):
        return size(block(x, jax.tree.map(lambda w: w.astype(jnp.float32), params)))

    eps = float(jnp.finfo(jnp.bfloat16).eps)  # the dense gradient is rounded to it
    return Case(loss, matrices(dtype=jnp.bfloat16), (tokens(),), eps=eps)


# --- programs in programs


@case
def a_jitted_function() -> Case:
    def loss(params, x):
        return size(jax.jit(jax.jit(block))(x, params))

    return Case(loss, matrices(), (tokens(),))


def checkpointed(policy: Any) -> Case:
    def named(x, w):
        return jax.ad_checkpoint.checkpoint_name(block(x, w), "block")

    def loss(params, x):
        return size(jax.checkpoint(named, policy=policy)(x, params))

    return Case(loss, matrices(), (tokens(),))


@case
def a_checkpoint() -> Case:
    return checkpointed(None)


@case
def a_checkpoint_that_saves_products() -> Case:
    return checkpointed(jax.checkpoint_policies.dots_with_no_batch_dims_saveable)


@case
def a_checkpoint_that_saves_names() -> Case:
    return checkpointed(jax.checkpoint_policies.save_only_these_names("block"))


@case
def a_checkpoint_that_returns_its_weights() -> Case:
    """As flax.nnx's do."""

    @jax.checkpoint
    def layer(w, x):
        return w, block(x, w)

    def loss(params, x):
        params, x = layer(params, x)
        return size(layer(params, x)[1])

    return Case(loss, matrices(), (tokens(),))


def scanned(reverse: bool = False, unroll: int = 1, wrap: Any = lambda f: f) -> Case:
    def loss(params, x):
        body = wrap(lambda x, w: (block(x, w), None))
        return size(jax.lax.scan(body, x, params, reverse=reverse, unroll=unroll)[0])

    return Case(loss, stacks(LAYERS), (tokens(),))


@case
def a_scan_over_layers() -> Case:
    return scanned()


@case
def a_scan_in_reverse() -> Case:
    return scanned(reverse=True)


@case
def an_unrolled_scan_in_reverse() -> Case:
    return scanned(reverse=True, unroll=2)


@case
def a_scan_of_a_checkpoint() -> Case:
    return scanned(wrap=jax.checkpoint)


@case
def a_scan_over_time() -> Case:
    """The weights are constants of the loop."""

    def loss(params, x):
        return size(jax.lax.scan(lambda h, x: (block(h + x, params), h), x[0], x)[1])

    return Case(loss, matrices(), (tokens(),))


@case
def a_scan_that_carries_its_weights() -> Case:
    def loss(params, x):
        def step(carry, x):
            h, w = carry
            return (block(h + x, w), w), None

        (h, w), _ = jax.lax.scan(step, (x[0], params), x)
        return size(h @ w["up"])

    return Case(loss, matrices(), (tokens(),))


@case
def a_scan_that_returns_its_layers() -> Case:
    """As flax.nnx's do."""

    def loss(params, x):
        x, params = jax.lax.scan(lambda x, w: (block(x, w), w), x, params)
        return size(jax.lax.scan(lambda x, w: (block(x, w), None), x, params)[0])

    return Case(loss, stacks(LAYERS), (tokens(),))


@case
def nested_scans_over_two_stacks() -> Case:
    def loss(params, x):
        def outer(x, w):
            return jax.lax.scan(lambda x, w: (block(x, w), None), x, w)

        return size(jax.lax.scan(outer, x, params)[0])

    axes = dict.fromkeys(("up", "down"), Axes(2, 3, (0, 1)))
    return Case(loss, stacks(2, LAYERS), (tokens(),), axes=axes)


@case
def a_scan_over_time_in_a_scan_over_layers() -> Case:
    def loss(params, x):
        def layer(x, w):
            return jax.lax.scan(lambda h, x: (block(h + x, w), h), x[0], x)[1], None

        return size(jax.lax.scan(layer, x, params)[0])

    return Case(loss, stacks(LAYERS), (tokens(),))


@case
def layers_taken_by_number() -> Case:
    def loss(params, x):
        for i in (0, -1, 1):
            x = block(x, jax.tree.map(lambda w, i=i: w[i], params))
        return size(x)

    return Case(loss, stacks(LAYERS), (tokens(),))


@case
def layers_taken_by_a_traced_number() -> Case:
    def loss(params, x, number):
        for i in (number, jnp.clip(number - 1, 0, 2)):
            x = block(x, jax.tree.map(lambda w, i=i: w[i], params))
        return size(x)

    return Case(loss, stacks(LAYERS), (tokens(), jnp.int32(2)))


@case
def layers_taken_in_a_loop() -> Case:
    def loss(params, x):
        def body(i, x):
            w = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), params)
            return block(x, w)

        return size(jax.lax.fori_loop(0, LAYERS, body, x))

    return Case(loss, stacks(LAYERS), (tokens(),))


@case
def a_conditional() -> Case:
    def loss(params, x):
        def skip(x):
            return x @ params["up"][:, :WIDTH]

        return size(jax.lax.cond(x[0, 0] > 0, lambda x: block(x, params), skip, x))

    return Case(loss, matrices(), (tokens(),))


@case
def a_switch_between_layers() -> Case:
    def loss(params, x):
        def run(number):
            w = {name: params[name][number] for name in params}
            return lambda x: block(x, w)

        return size(jax.lax.switch(2, [run(i) for i in range(LAYERS)], x))

    return Case(loss, stacks(LAYERS), (tokens(),))


@case
def examples_mapped_one_by_one() -> Case:
    def loss(params, x):
        return size(jax.vmap(jax.vmap(block, (0, None)), (0, None))(x, params))

    return Case(loss, matrices(), (tokens(2),))


@case
def experts_mapped_each_over_its_tokens() -> Case:
    def loss(params, x):
        return size(jax.vmap(block)(x, params))

    return Case(loss, stacks(LAYERS), (tokens(LAYERS),))


@case
def experts_mapped_over_the_same_tokens() -> Case:
    def loss(params, x):
        return size(jax.vmap(block, (None, 0))(x, params))

    return Case(loss, stacks(LAYERS), (tokens(),))


@case
def a_scan_over_layers_of_experts() -> Case:
    def loss(params, x):
        def layer(x, w):
            return jax.vmap(block)(x, w), None

        return size(jax.lax.scan(layer, x, params)[0])

    axes = dict.fromkeys(("up", "down"), Axes(2, 3, (0, 1)))
    return Case(loss, stacks(2, LAYERS), (tokens(LAYERS),), axes=axes)


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, ct: (jnp.clip(ct, -0.01, 0.01),))


@case
def a_custom_gradient_beside() -> Case:
    def loss(params, x):
        return size(clipped(jax.nn.gelu(clipped(x @ params["up"]))) @ params["down"])

    return Case(loss, matrices(), (tokens(),))


@case
def effects_beside() -> Case:
    def loss(params, x):
        x = block(x, params)
        jax.debug.callback(lambda _: None, x)
        _, numbers = jax.lax.top_k(x, 2)
        return size(x) + jnp.mean(numbers)

    return Case(loss, matrices(), (tokens(),))


@case
def uses_that_pass_no_gradient_on() -> Case:
    def loss(params, x):
        up, down = params["up"], params["down"]
        jax.debug.callback(lambda _: None, up)
        target = block(x, jax.lax.stop_gradient(params))
        return size(block(x, params) - target + jnp.sum(up > 0) + jnp.sum(jnp.argmax(down, 0)))

    return Case(loss, matrices(), (tokens(),))


@case
def numpy_parameters() -> Case:
    plain = a_plain_function()
    return plain._replace(params=jax.tree.map(np.asarray, plain.params))


# --- factors, sums, concatenations


@case
def factors_along_one_side() -> Case:
    """Numbers, constants, and parameters that have gradients of their own."""

    def loss(params, x):
        up, down = params["up"], params["down"]
        h = jnp.tanh(x @ (0.5 * up) + x @ (-up / 4) + x @ (up * jnp.arange(INNER) / 5))
        h = h + jnp.tanh(x @ (params["rows"][:, None] * up * params["columns"]))
        return size(h @ (down / params["scale"])) + size(h @ (down * params["columns"][:, None]))

    vectors = {"rows": normal(WIDTH), "columns": normal(INNER), "scale": jnp.float32(3)}
    return Case(loss, {**matrices(), **vectors}, (tokens(),), exact=False)


@case
def factors_before_other_operations() -> Case:
    def loss(params, x):
        scaled = params["up"] * params["columns"]
        left, right = jnp.split(scaled.T.reshape(INNER, WIDTH)[::-1], (4,))
        rows = (params["down"] * params["columns"][:, None])[jnp.array([2, 0])]
        half = (params["down"] * jnp.float32(0.3)).astype(jnp.bfloat16)
        h = x.astype(jnp.bfloat16) @ half.T
        return size(x @ left.T) + size(x @ right.T) + size(h) + jnp.sum(rows) + jnp.sum(scaled)

    params = {**matrices(), "columns": normal(INNER)}
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    return Case(loss, params, (tokens(),), {"['down']": "gather"}, eps=eps, exact=False)


@case
def normalized_weights() -> Case:
    """Weight normalization, and DoRA's: the length of every column is a parameter of its own."""

    def loss(params, x):
        up, length = params["up"], params["length"]
        v = up * (length / jnp.sqrt(jnp.sum(up**2, axis=0)))
        down = params["down"] / jnp.linalg.norm(params["down"], axis=0, keepdims=True)
        return size(jnp.tanh(x @ v) @ down)

    return Case(loss, {**matrices(), "length": normal(INNER)}, (tokens(),), exact=False)


@case
def penalties() -> Case:
    def loss(params, x):
        squares = [jnp.sum(w**2) for w in jax.tree.leaves(params)]
        down = params["down"].astype(jnp.bfloat16)
        more = jnp.mean(jnp.square(params["up"]), 0) @ jnp.arange(INNER)
        more += 0.1 * jnp.sum(params["up"] * params["up"]) + jnp.sum(down) + jnp.mean(down, 1)[3]
        return size(block(x, params)) + 0.3 * sum(squares) + 0.2 * optax.tree.norm(params) + more

    eps = float(jnp.finfo(jnp.bfloat16).eps)
    return Case(loss, matrices(), (tokens(),), eps=eps, exact=False)


@case
def concatenated_and_padded() -> Case:
    def loss(params, x):
        q, k, v = (params[name] for name in ("q", "k", "v"))
        fused = x @ jnp.concatenate([q, k * 0.5, jnp.ones((WIDTH, 2)), v.T], axis=1)
        q2, rest = jnp.split(jnp.concatenate([q, k], axis=1), [9], axis=1)
        rows = jnp.concatenate([x, x], axis=1) @ jnp.concatenate([q, k])
        padded = jnp.pad(q, ((1, 2), (0, 3)))[1:, :9]
        mapped = jnp.einsum("td,kde->kte", x, jnp.stack([q, k]))
        heads = jnp.stack([q, k], axis=1).reshape(WIDTH, 2, 2, 4)
        total = size(fused) + size(x @ q2) + size(x @ rest) + size(rows) + size(mapped)
        total += size(jnp.einsum("td,dahk->tahk", x, heads))
        return total + size(x @ padded[: x.shape[1]][:, ::-1]) + size(x @ jnp.flip(q, (0, 1)))

    params = {"q": normal(WIDTH, 8), "k": normal(WIDTH, 8, seed=1), "v": normal(9, WIDTH)}
    return Case(loss, params, (tokens(),))


@case
def sums_with_something() -> Case:
    """Noise on a weight; a low-rank change of it, whose own gradient needs the dense one."""

    def loss(params, x):
        noisy = params["up"] + 0.1 * normal(WIDTH, INNER, seed=5)
        return size(jnp.tanh(x @ noisy) @ (params["down"] + params["down"] - 1.0))

    return Case(loss, matrices(), (tokens(),))


@case
def nothing_but_another_place_or_order() -> Case:
    def loss(params, x):
        up, down = jax.lax.optimization_barrier((params["up"], params["down"]))
        up = jax.device_put(jnp.copy(up))
        return size(jnp.tanh(x @ up) @ jax.jit(jnp.transpose)(down.T))

    return Case(loss, matrices(), (tokens(),))


@case
def repeated_weights() -> Case:
    def loss(params, x):
        up = jnp.broadcast_to(params["up"], (TOKENS, WIDTH, INNER))
        h = jnp.einsum("td,tdk->tk", x, up)
        return size(h @ jnp.broadcast_to(params["down"], (3, INNER, WIDTH)))

    return Case(loss, matrices(), (tokens(),))


@case
def eight_bit_floats() -> Case:
    def loss(params, x):
        up = params["up"].astype(jnp.float8_e4m3fn)
        h = jax.lax.dot(x.astype(jnp.float8_e4m3fn), up, preferred_element_type=jnp.float32)
        down = params["down"].astype(jnp.float8_e5m2).astype(jnp.float32)
        return size(jnp.tanh(h) @ down)

    eps = float(jnp.finfo(jnp.float8_e5m2).eps)
    return Case(loss, matrices(), (tokens(),), eps=eps)


@case
def what_the_loss_does_not_depend_on() -> Case:
    """Metrics, a scale that is taken for a constant, a target of an average."""

    def loss(params, x):
        up, down = params["up"], params["down"]
        metric = sum(jnp.linalg.norm(jnp.tanh(w)) for w in (up, down))
        jax.debug.callback(lambda _: None, metric)
        scale = jax.lax.stop_gradient(jnp.max(jnp.abs(up)))
        average = jax.tree.map(lambda w: 0.9 * jnp.sin(w) + 0.1 * w, params)
        target = jax.lax.stop_gradient(block(x, average))
        return size(jnp.tanh(x @ (up / scale)) @ down - target)

    return Case(loss, matrices(), (tokens(),))


# --- lookups


@case
def lookups_of_every_kind() -> Case:
    """Mapped over examples, over tables, along the projected side, cut off at the ends."""
    vocabulary = 3 * WIDTH

    def loss(params, x):
        ids = jnp.array([[1, 5, 1, -1], [-2, 0, 40, 7]])
        mapped = jax.vmap(lambda ids: params["embed"][ids])(ids)
        clipped = params["embed"].at[ids[0]].get(mode="clip") @ params["wide"][:, :5]
        columns = jnp.take(params["wide"], ids, axis=1, mode="fill", fill_value=0)
        tables = jax.vmap(lambda table, ids: table[ids % 7])(params["tables"], ids)
        scaled = (params["embed"] * jnp.sqrt(5.0))[jnp.abs(ids)]
        expert = params["tables"][ids % 2]
        padded = jnp.pad(params["embed"], ((3, 2), (0, 0)))[ids % (vocabulary + 5)]
        total = size(mapped) + size(clipped) + size(columns) + size(tables) + size(scaled)
        return total + size(padded) + size(jnp.tanh(expert)) + size(x @ params["wide"])

    params = {
        "embed": normal(vocabulary, WIDTH),
        "wide": normal(WIDTH, vocabulary),
        "tables": normal(2, 7, WIDTH),
    }
    axes = {"wide": Axes(0, 1), "tables": Axes(1, 2, 0)}
    return Case(loss, params, (tokens(),), {"['tables']": "gather"}, axes)


# --- stacks


@case
def parts_of_stacks() -> Case:
    """The first layer by itself, the others in a scan; and layers in two groups."""

    def loss(params, x):
        first, others = (jax.tree.map(take, params) for take in (lambda w: w[0], lambda w: w[1:]))
        x = jax.lax.scan(lambda x, w: (block(x, w), None), block(x, first), others)[0]

        def group(x, w):
            return jax.lax.scan(lambda x, w: (block(x, w), None), x, w)[0], None

        groups = jax.tree.map(lambda w: w.reshape(2, 2, *w.shape[1:]), params)
        return size(jax.lax.scan(group, x, groups)[0])

    return Case(loss, stacks(4), (tokens(),))


@case
def layers_along_another_axis() -> Case:
    def loss(params, x):
        moved = jax.tree.map(lambda w: jnp.moveaxis(w, 1, 0), params)
        return size(jax.lax.scan(lambda x, w: (block(x, w), None), x, moved)[0])

    params = jax.tree.map(lambda w: jnp.moveaxis(w, 0, 1), stacks(LAYERS))
    axes = dict.fromkeys(("up", "down"), Axes(0, 2, 1))
    return Case(loss, params, (tokens(),), axes=axes)


@case
def a_scan_over_the_second_of_two_stacks() -> Case:
    """Experts of layers: `(experts, layers, n, m)`."""

    def loss(params, x):
        def layer(x, w):
            return jax.vmap(block)(x, w), None

        moved = jax.tree.map(lambda w: jnp.swapaxes(w, 0, 1), params)
        return size(jax.lax.scan(layer, x, moved)[0])

    axes = dict.fromkeys(("up", "down"), Axes(2, 3, (0, 1)))
    return Case(loss, stacks(2, LAYERS), (tokens(2),), axes=axes)


@case
def stacks_one_behind_the_other() -> Case:
    def loss(params, x):
        w = jax.tree.map(lambda w: w[::-1] * 0.5, params)
        w = jax.tree.map(lambda w: jnp.concatenate([w[:1], w]), w)
        x = jax.vmap(block, (None, 0))(x, w)
        return size(x)

    return Case(loss, stacks(LAYERS), (tokens(),))


@case
def a_scan_over_factors_of_layers() -> Case:
    def loss(params, x):
        w = {
            "up": params["up"] * params["by_layer"][:, None, :],
            "down": params["down"] * 0.5,
        }
        return size(jax.lax.scan(lambda x, w: (block(x, w), None), x, w)[0])

    params = {**stacks(LAYERS), "by_layer": normal(LAYERS, INNER)}
    return Case(loss, params, (tokens(),), axes={"by_layer": None}, exact=False)


# --- convolutions and groups of rows


@case
def convolutions_of_every_kind() -> Case:
    """With windows that overlap, strides and dilations; with the projected side at either end."""

    def convolved(x, kernel, **arguments):
        return jax.lax.conv_general_dilated(
            x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **arguments
        )

    def loss(params, x):
        x = jnp.tanh(x.reshape(2, 5, 6, 3))
        y = convolved(x, params["out"], window_strides=(1, 1), padding="SAME")
        y = y + convolved(
            x, params["out"], window_strides=(1, 1), padding="SAME", rhs_dilation=(2, 1)
        )
        z = convolved(x, params["in"], window_strides=(2, 1), padding=((1, 0), (2, 2)))
        z = jnp.sum(z) + size(
            convolved(x, params["in"] * 0.5, window_strides=(1, 1), padding="VALID")
        )
        return size(jnp.tanh(y)) + z

    params = {"out": normal(2, 3, 3, 19), "in": normal(3, 2, 3, 19)}
    axes = {"out": Axes((0, 1, 2), 3), "in": Axes(3, (0, 1, 2))}
    images = draws.normal(7, 2, 5 * 6 * 3)
    case = Case(loss, params, (images,), axes=axes)
    return case


@case
def convolutions_with_factors() -> Case:
    """Parameters of their own, along the features of the result, of the input, and the window."""

    def loss(params, x):
        x = jnp.tanh(x.reshape(2, 5, 6, 3))
        y = [
            jax.lax.conv_general_dilated(
                x,
                params["kernel"] * params[name].reshape(shape),
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            for name, shape in (("out", (19,)), ("in", (3, 1)), ("window", (2, 1, 1, 1)))
        ]
        return sum(size(jnp.tanh(own)) for own in y)

    vectors = {"out": normal(19), "in": normal(3), "window": normal(2)}
    params = {"kernel": normal(2, 3, 3, 19), **vectors}
    images = draws.normal(7, 2, 5 * 6 * 3)
    return Case(
        loss,
        params,
        (images,),
        {"['kernel']": "conv_general_dilated"},
        {"kernel": Axes((0, 1, 2), 3)},
        exact=False,
        terms=2 * 5 * 6,
    )


@case
def rows_in_groups() -> Case:
    """Each times the matrix of its expert."""

    def loss(params, x):
        sizes = jnp.array([2, 0, 3])
        h = jax.lax.ragged_dot(x, 0.5 * params["up"] * params["scale"], sizes)
        return size(jax.lax.ragged_dot(jnp.tanh(h), params["down"], sizes))

    return Case(loss, {**stacks(LAYERS), "scale": normal(INNER)}, (tokens(),), exact=False)


# --- uses whose own gradients are dense for a moment

ONE = jnp.ones((1, 1))
TWO = functools.partial(jnp.argmax, jnp.array([0, 0, 1]))

doubled_p = core.Primitive("doubled")
doubled_p.def_impl(lambda x: 2 * x)
doubled_p.def_abstract_eval(lambda x: x)
ad.deflinear2(doubled_p, lambda ct, x: (doubled_p.bind(ct),))
mlir.register_lowering(doubled_p, mlir.lower_fun(lambda x: 2 * x, multiple_results=False))


OPAQUE: dict[str, tuple[str, Callable[[jax.Array], jax.Array]]] = {
    "function": ("tanh", jnp.tanh),
    "mask": ("mul", lambda w: w * (jnp.arange(INNER) % 2 + jnp.arange(WIDTH)[:, None])),
    "square_of_a_factor": ("square", lambda w: w * jnp.arange(INNER)),
    "rows_in_turn": ("scan", lambda w: jax.lax.map(jnp.sum, w)),
    "changing_carry": ("scan", lambda w: jax.lax.fori_loop(0, 2, lambda i, w: w * 2, w)),
    "scattered": ("dynamic_update_slice", lambda w: jax.lax.dynamic_update_slice(w, ONE, (1, 2))),
    "flat": ("reshape", lambda w: w.reshape(-1) @ jnp.ones((WIDTH * INNER, 2))),
    "every_other_column": ("slice", lambda w: jnp.ones(WIDTH) @ w[:, ::2]),
    "returned_by_branches": ("cond", lambda w: jax.lax.cond(True, jnp.transpose, jnp.transpose, w)),
    "collected_by_a_scan": ("scan", lambda w: jax.lax.scan(lambda c, _: (c, w.T), 0, length=2)[1]),
    "custom_gradient": ("custom_vjp_call", clipped),
    "custom_tangent": ("custom_jvp_call", jax.nn.relu),
    "integer_product": ("dot_general", lambda w: w @ jnp.ones((INNER, 2), jnp.int32)),
    "complex_product": ("dot_general", lambda w: jnp.abs(w @ jnp.full((INNER, 2), 1j))),
    "cubed": ("integer_pow", lambda w: w**3),
    "two_lookups": ("gather", lambda w: w[jnp.arange(3), jnp.arange(3)]),
    "future_primitive": ("doubled", lambda w: doubled_p.bind(w)),
}
FOLLOWED: dict[str, Callable[[jax.Array], jax.Array]] = {
    "penalty": lambda w: jnp.sum(jnp.square(w)),
    "columns_looked_up": lambda w: w[jnp.arange(4)],
    "sum_of_rows": lambda w: w.sum(0),
    "unknown_index": lambda w: jax.lax.dynamic_slice(w, (0, TWO()), (WIDTH, 4)),
    "returned_by_a_checkpoint": lambda w: jax.checkpoint(jnp.transpose)(w),
}


@case
def opaque_uses() -> Case:
    """Weights that are used twice, in a product and in some other way, beside others."""

    def loss(params, x):
        total = size(x @ params["beside"])
        for name, use in ({name: use for name, (_, use) in OPAQUE.items()} | FOLLOWED).items():
            total += size(x @ params[name]) + size(use(params[name]))
        return total

    names = [*OPAQUE, *FOLLOWED]
    params = {name: normal(WIDTH, INNER, seed=i) for i, name in enumerate(names)}
    dense = {f"['{name}']": operation for name, (operation, _) in OPAQUE.items()}
    return Case(loss, {"beside": normal(WIDTH, 17), **params}, (tokens(),), dense)


@case
def a_product_of_two_weights() -> Case:
    def loss(params, x):
        return size(x @ (params["up"] @ params["down"]))

    return Case(loss, matrices(), (tokens(),))


@case
def a_part_of_the_projected_side_contracted() -> Case:
    def loss(params, x):
        return size(jnp.einsum("dhk,k->dh", params["q"], jnp.arange(7.0)))

    params = {"q": normal(17, 2, 7)}
    return Case(loss, params, (tokens(),), axes={"q": Axes(0, (1, 2))})


# --- the law


def is_sketch(node: Any) -> bool:
    return isinstance(node, florax.Sketch)


def flat(gradients: Any) -> list[Any]:
    return jax.tree.leaves(gradients, is_leaf=is_sketch)


def check(case: Case, tx: Any = None, exact: bool = True) -> None:
    """Sketches are the compressed gradients, dense gradients are JAX's, the report names them."""
    exact = exact and case.exact
    tx = case.transformation() if tx is None else tx
    state = in_cycle(tx.init(case.params), 3)

    @jax.jit
    def born(params: Any, state: Any, *batch: Any) -> Any:
        return florax.value_and_grad(case.loss, tx)(params, *batch, opt_state=state)

    @jax.jit
    def both(params: Any, state: Any, drawn: list[list[jax.Array]], *batch: Any) -> Any:
        value, dense = jax.value_and_grad(case.loss)(params, *batch)
        return born(params, state, *batch), (value, compressed(dense, state, drawn, case.terms))

    arguments = (case.params, state, projections(state), *case.batch)
    (value, gradients), (expected, wanted) = both(*arguments)
    assert value == expected or (not exact and np.isclose(value, expected, 8 * case.eps))
    rows = florax.gradient_report(case.loss, tx, case.params, *case.batch).rows
    assert [row.across for row in rows] == [
        leaf.across and leaf.across.stored_shape for leaf in state.sketch.plan
    ]
    reported = {row.path: row for row in rows}
    for leaf, gradient, want in zip(state.sketch.plan, flat(gradients), wanted, strict=True):
        row = reported[leaf.path]
        assert is_sketch(gradient) == (leaf.rank is not None) == (row.sketch is not None)
        assert bool(row.reason) == (row.sketch is None)
        assert bool(row.dense_uses) == (leaf.path in case.dense), (leaf.path, row.dense_uses)
        assert case.dense.get(leaf.path, "") in "".join(row.dense_uses), row.dense_uses
        assert_is_gradient(gradient, want, case.eps, exact)
    dense = {
        size
        for leaf in state.sketch.plan
        if leaf.rank is None or leaf.path in case.dense
        for size in sizes_of(leaf)
    }
    sketched = [leaf for leaf in state.sketch.plan if not dense & sizes_of(leaf)]
    program = inner(both.trace(*arguments).jaxpr, "born")
    found = set(gradients_of_full_size(program, sketched))
    # What the loss itself makes, such as a weight times a factor, is no gradient; nor is a weight
    # that is repeated for factors of examples. A checkpoint makes both again.
    forward = jax.make_jaxpr(case.loss)(case.params, *case.batch).jaxpr
    # What a loop collects is made, and looked at, inside of it.
    own = {*gradients_of_full_size(forward, sketched), "broadcast_in_dim", "scan"}
    found -= own - {"dot_general", "add_any"}
    # What the backward pass of a branch needs, be it a form of a weight, is handed on by all of
    # them, as zeros by the others, and a loop around them keeps it: so in the dense program, too.
    if any(equation.primitive.name == "cond" for equation in equations(program)):
        found &= {"dot_general", "add_any", "pad", "dynamic_update_slice"}
    assert not found


class Wanted(NamedTuple):
    """A gradient as JAX makes it; its sketch, or both; and the lengths of both factors of each."""

    gradient: jax.Array
    sketch: jax.Array | tuple[jax.Array, ...] | None
    lengths: list[jax.Array]
    terms: list[int]


def in_cycle(state: Any, cycle: int) -> Any:
    """The state of a transformation in another cycle."""
    return state._replace(sketch=dataclasses.replace(state.sketch, cycle=jnp.int32(cycle)))


@jax.jit
def projections(state: Any) -> list[list[jax.Array]]:
    """Of all leaves. Apart from the rest, as it takes most of the time to compile."""
    drawn = state.sketch.draw()
    return [[drawn[part.path] for part in leaf.parts if part.rank] for leaf in state.sketch.plan]


def compressed(
    dense: Any, state: Any, drawn: list[list[jax.Array]], count: int = TOKENS
) -> list[Wanted]:
    """What `value_and_grad` should return, leaf by leaf in their order."""
    wanted = []
    for leaf, gradient, own in zip(state.sketch.plan, jax.tree.leaves(dense), drawn, strict=True):
        wide = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
        length = jnp.linalg.norm(wide.reshape(-1))
        if not own:
            wanted.append(Wanted(gradient, None, [length], [count]))
            continue
        matrices = [
            a.reshape(*leaf.stack_shape, part.rank, -1)
            for a, part in zip(own, leaf.parts, strict=True)
        ]
        longest = [jnp.max(jnp.linalg.norm(a, axis=(-2, -1))) for a in matrices]
        sketches = [part.compress(wide, a) for part, a in zip(leaf.parts, own, strict=True)]
        kept = sketches[0] if leaf.across is None else tuple(sketches)
        terms = [count + a.shape[-1] for a in matrices]
        wanted.append(Wanted(gradient, kept, [length * own for own in longest], terms))
    return wanted


def assert_is_gradient(gradient: Any, want: Wanted, eps: float, exact: bool = True) -> None:
    """Both orders of the products x dy A round each of their sums' terms once, at random."""
    if not is_sketch(gradient) and exact:
        np.testing.assert_array_equal(gradient, want.gradient)
        return
    array, wanted = gradient, want.gradient
    if is_sketch(gradient):
        array, wanted = gradient.array, want.sketch
    assert jax.tree.structure(array) == jax.tree.structure(wanted)
    pairs = zip(jax.tree.leaves(array), jax.tree.leaves(wanted), strict=True)
    for (own, other), length, terms in zip(pairs, want.lengths, want.terms, strict=True):
        assert own.dtype == other.dtype
        error = np.linalg.norm(np.asarray(own - other, np.float32).reshape(-1))
        assert error <= eps * np.sqrt(terms) * length


PASSES_ON = {
    *("convert_element_type", "copy", "name", "pvary", "pcast", "optimization_barrier", "rev"),
    *("transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim"),
    *("slice", "dynamic_slice", "split", "stop_gradient"),
    *("jit", "pjit", "closed_call", "checkpoint", "remat", "remat2", "scan", "cond", "while"),
    *("custom_vjp_call", "custom_jvp_call", "shard_map"),
}


def gradients_of_full_size(jaxpr: Any, leaves: Any) -> list[str]:
    """The operations that compute a float array of the size of a leaf, or of one of its layers.

    What only passes on a part or another form of a larger array, and so at last a weight, does not;
    and what nobody reads is not computed.
    """
    sizes = {s for leaf in leaves for s in sizes_of(leaf)}
    found = []

    def is_full(var: Any) -> bool:
        shape, dtype = getattr(var.aval, "shape", ()), getattr(var.aval, "dtype", jnp.int32)
        return jnp.issubdtype(dtype, jnp.inexact) and np.prod(shape) in sizes

    for equation in equations(jaxpr):
        name, results = equation.primitive.name, list(filter(is_full, equation.outvars))
        largest = max(
            (np.prod(var.aval.shape) for var in equation.invars if hasattr(var.aval, "shape")),
            default=0,
        )
        passes = name in PASSES_ON and all(np.prod(var.aval.shape) <= largest for var in results)
        if results and not passes:
            found.append(name)
    return found


def sizes_of(leaf: Any) -> set[int]:
    """How many entries it has, and one of its layers."""
    return {int(np.prod(leaf.shape[i:])) for i in range(len(leaf.batch) + 1)}


def equations(jaxpr: Any) -> Any:
    """All equations of a program and of the programs in it, but for those that nobody reads."""
    read, live = set(filter(is_variable, jaxpr.outvars)), []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not read.isdisjoint(equation.outvars):
            read.update(filter(is_variable, equation.invars))
            live.append(equation)
    for equation in reversed(live):
        yield equation
        for param in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
            if is_jaxpr(param):
                yield from equations(getattr(param, "jaxpr", param))


def is_variable(node: Any) -> bool:
    return not isinstance(node, core.Literal)


def is_jaxpr(node: Any) -> bool:
    return isinstance(node, core.Jaxpr | core.ClosedJaxpr)


def inner(jaxpr: Any, name: str) -> Any:
    """The program of the jitted function of that name."""
    (found,) = (e.params["jaxpr"] for e in equations(jaxpr) if e.params.get("name") == name)
    return found.jaxpr
