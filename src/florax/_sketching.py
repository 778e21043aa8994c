"""Gradients that are born compressed: `value_and_grad` for any JAX function.

The loss is traced and its program evaluated again with the weights to be compressed followed
through it (`_evaluator`), and that is differentiated.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from florax import (
    _accumulate,
    _checks,
    _evaluator,
    _jaxprs,
    _leaves,
    _meshes,
    _momentum,
    _sketches,
    _views,
)


class Born(NamedTuple):
    """What the sketch of one leaf's gradient is made with.

    Attributes:
      leaf: the leaf.
      keys: of its matrices in the cycle, shape `(matrices, 2)`.
    """

    leaf: _leaves.Leaf
    keys: jax.Array


class Program(NamedTuple):
    """A traced loss and the parameters that it is differentiated by."""

    jaxpr: _jaxprs.Jaxpr
    consts: Sequence[Any]
    result: Any  # shapes of what the loss returns
    leaves: list[jax.Array]
    treedef: Any
    paths: list[str]


def trace_loss(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int],
    has_aux: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Program:
    """Trace a loss as a function of the arguments `argnums`, after checking both."""
    several = not _checks.is_int(argnums)
    numbers = tuple(argnums) if isinstance(argnums, Sequence) else (argnums,)
    for number in numbers:
        if not _checks.is_int(number) or not -len(args) <= number < len(args):
            raise ValueError(
                f"argnums must number positional arguments of the loss, got {argnums!r} for "
                f"{len(args)} arguments. Pass what is differentiated by position."
            )
    numbers = tuple(number % len(args) for number in numbers)
    params = tuple(args[number] for number in numbers) if several else args[numbers[0]]

    def loss(params: Any) -> Any:
        replaced = list(args)
        for number, value in zip(numbers, params if several else (params,), strict=True):
            replaced[number] = value
        return loss_fn(*replaced, **kwargs)

    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    for path, leaf in flat:
        _leaves.check_dtype(_leaves.name(path), jnp.result_type(leaf))
    jaxpr, consts, result = _jaxprs.trace(loss, params)
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(f"With has_aux=True the loss must return a pair (loss, aux), got {result}.")
    value = result[0] if has_aux else result
    if not hasattr(value, "shape") or value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"The loss must be a real scalar, got {value}. Return one number, and what else is "
            "wanted as aux, with has_aux=True."
        )
    paths = [_leaves.name(path) for path, _ in flat]
    return Program(jaxpr, consts, result, [leaf for _, leaf in flat], treedef, paths)


def born(opt_state: Any, program: Program) -> dict[int, Born]:
    """By number of the leaf, what its sketch is made with, for all that `opt_state` compresses."""
    numbers = {path.removesuffix(".value"): i for i, path in enumerate(program.paths)}
    found: dict[int, Born] = {}
    states = first_states(opt_state)
    if not states:
        raise ValueError(
            "opt_state holds no FLORA state that sees the gradients before anything else does, got "
            f"a {type(opt_state).__name__}. Pass the state of flora_accumulate, or of a "
            "flora_momentum that stands first; what must see full gradients needs "
            "jax.value_and_grad."
        )
    for state in states:
        own: dict[int, _leaves.Leaf] = {}
        for leaf in state.sketch.plan:
            number = numbers.get(leaf.path.removesuffix(".value"))
            if number is None or jnp.shape(program.leaves[number]) != leaf.shape:
                raise ValueError(
                    f"opt_state was made for parameters with {leaf.path} of shape {leaf.shape}, "
                    f"which what is differentiated has not: {program.paths}. Pass the state of "
                    "these parameters, or their argnums."
                )
            if leaf.rank is not None:
                own[number] = leaf
        cycle = state.gradient_step if _accumulates(state) else state.cycle
        found |= with_keys(own, state.key, cycle)
    return found


def with_keys(leaves: dict[int, _leaves.Leaf], key: jax.Array, cycle: jax.Array) -> dict[int, Born]:
    """By number of the leaf, what its sketch is made with in a cycle."""
    keys = _leaves.matrix_keys(tuple(leaves.values()), key, cycle)
    pairs = zip(leaves.items(), keys, strict=True)
    return {number: Born(leaf, own) for (number, leaf), own in pairs}


def first_states(opt_state: Any) -> list[Any]:
    """The FLORA states that see gradients before any other transformation does."""
    if isinstance(opt_state, _accumulate.FloraAccumulateState | _momentum.FloraMomentumState):
        return [opt_state]
    if type(opt_state) is tuple and opt_state:  # the state of a chain
        return first_states(opt_state[0])
    # Wrappers that hand on what they are given, and need not know what it is.
    if isinstance(opt_state, _HAND_ON):
        return first_states(opt_state.inner_state)
    if isinstance(opt_state, optax.transforms.PartitionState):
        inner_states = opt_state.inner_states.values()
        return [state for inner in inner_states for state in first_states(inner)]
    return []


_HAND_ON = (
    optax.MaskedState,
    optax.InjectHyperparamsState,
    optax.InjectStatefulHyperparamsState,
)


def _accumulates(state: Any) -> bool:
    return isinstance(state, _accumulate.FloraAccumulateState)


def differentiate(
    program: Program, found: dict[int, Born], totals: dict[int, jax.Array]
) -> tuple[Any, dict[int, jax.Array], dict[int, jax.Array]]:
    """Value, sketches and dense gradients, by number of the leaf, of a traced loss.

    To `totals` the sketches are added, in place where XLA may; a leaf that cannot be followed
    through the program is not among them and has a dense gradient.
    """
    refused = refusals(program, found)
    sketched = {number: how for number, how in found.items() if number not in refused}
    dense = {i: leaf for i, leaf in enumerate(program.leaves) if i not in sketched}
    seeds = {number: totals[number] for number in sketched}

    def loss(carriers: dict[int, jax.Array], dense: dict[int, jax.Array]) -> Any:
        (value, *aux), carriers, _ = _evaluate(program, sketched, carriers, dense)
        return (value, carriers), aux

    carriers = {
        number: _meshes.varying_as(jnp.zeros_like(seed), seed) for number, seed in seeds.items()
    }
    (value, _), pull, aux = jax.vjp(loss, carriers, dense, has_aux=True)
    sketches, grads = pull((jnp.ones_like(value), seeds))
    result = jax.tree.unflatten(jax.tree.structure(program.result), [value, *aux])
    return result, sketches, grads


def refusals(program: Program, found: dict[int, Born]) -> dict[int, str]:
    """Which weights are used in a way that cannot be followed, and in which operation."""
    refused: dict[int, str] = {}

    def probe() -> None:
        carriers = {i: jnp.zeros(how.leaf.stored_shape) for i, how in found.items()}
        refused.update(_evaluate(program, found, carriers, dict(enumerate(program.leaves)))[2])

    jax.eval_shape(probe)
    return refused


def _evaluate(
    program: Program,
    sketched: dict[int, Born],
    carriers: dict[int, jax.Array],
    dense: dict[int, jax.Array],
) -> tuple[list[Any], dict[int, jax.Array], dict[int, str]]:
    """Results of the loss, the carriers after their last use, and the refusals."""
    evaluator = _evaluator.Evaluator(dict(carriers), {})
    params: list[Any] = []
    for number, leaf in enumerate(program.leaves):
        if number in sketched:
            how = sketched[number]
            view = _views.View.of(how.leaf)
            source = _views.Source(how.keys, ())
            params.append(_evaluator.Weight(jnp.asarray(leaf), source, number, view))
        else:
            params.append(dense[number])
    value, *aux = evaluator.run(program.jaxpr, program.consts, *params)
    (value,) = evaluator.plain([value], "the loss itself")
    # What is only reported is not differentiated: a weight may stand there.
    return [value, *_evaluator.arrays(aux)], evaluator.totals, evaluator.refused


def value_and_grad(
    loss_fn: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    r"""As `jax.value_and_grad`, with compressed leaves' gradients born as sketches.

    For a product y = x W the gradient xᵀ dy and its sketch are

    .. math::
        C = (x^\top\, dy)\, A^\top = x^\top (dy\, A^\top),

    and the right-hand side is fewer operations than the gradient itself, which never exists. The
    model needs no change: the loss is traced, and where one of its products consumes a compressed
    weight, the backward pass makes the sketch. It sees through jit, `jax.checkpoint`, conditionals,
    scans over stacked weights, casts, transposes, reshapes and slices; a product may be a lookup of
    rows or a convolution over patches; the uses of a tied weight add up. A weight that is used in
    any other way keeps its dense gradient, which the transformation then compresses: never a wrong
    number. `gradient_report` says beforehand which those are, and why.

    Args:
      loss_fn: a function whose result is a real scalar, or a pair of it and anything else.
      argnums: which positional arguments to differentiate by: what `tx.init` was given; with
        several, the tuple of them.
      has_aux: whether `loss_fn` returns a pair `(loss, aux)`.

    Returns:
      A function of the arguments of `loss_fn` and of `opt_state`, a keyword: the state of
      `flora_accumulate`, or of a `flora_momentum` that stands first, or of a chain that begins with
      one. It returns what `jax.value_and_grad` does, with a `Sketch` in the place of each
      compressed gradient: equal to the compressed gradient to rounding. The sketches are drawn for
      the state's current cycle: pass them to `tx.update` with that very state.

    Raises:
      ValueError: `opt_state` holds no FLORA state that sees gradients first, or was made for other
        parameters.
      TypeError: the loss is not a real scalar, or a parameter is not of a floating-point dtype.

    >>> import florax, jax, jax.numpy as jnp, optax
    >>> tx = florax.flora_accumulate(optax.adafactor(1e-3), every_k_schedule=4, rank=16)
    >>> params = {"kernel": jnp.ones((512, 256)), "bias": jnp.zeros(256)}
    >>> loss_fn = lambda params, x: jnp.mean((x @ params["kernel"] + params["bias"]) ** 2)
    >>> @jax.jit
    ... def micro_step(params, state, x):
    ...     loss, grads = florax.value_and_grad(loss_fn)(params, x, opt_state=state)
    ...     updates, state = tx.update(grads, state, params)
    ...     return optax.apply_updates(params, updates), state, grads
    >>> params, state, grads = micro_step(params, tx.init(params), jnp.ones((8, 512)))
    >>> type(grads["kernel"]).__name__, grads["kernel"].array.shape, grads["bias"].shape
    ('Sketch', (512, 16), (256,))

    Source: beyond the paper, which states that FLORA does not save the memory of back-propagation
    (Hao et al., 2024, arXiv:2402.03293). For accumulation it can: Algorithm 1 needs G Aᵀ only.
    """

    def value_and_grad_fn(*args: Any, opt_state: Any, **kwargs: Any) -> tuple[Any, Any]:
        program = trace_loss(loss_fn, argnums, has_aux, args, kwargs)
        found = born(opt_state, program)
        totals = {
            i: how.leaf.zeros(program.leaves[i], jnp.promote_types(how.leaf.dtype, jnp.float32))
            for i, how in found.items()
        }
        value, sketches, dense = differentiate(program, found, totals)
        grads = [
            _sketches.Sketch(sketches[i], found[i].leaf) if i in sketches else dense[i]
            for i in range(len(program.leaves))
        ]
        return value, jax.tree.unflatten(program.treedef, grads)

    return value_and_grad_fn
