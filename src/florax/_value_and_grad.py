"""Gradients that are born compressed: `value_and_grad` for any JAX function.

The loss is traced and its program evaluated again with the weights to be compressed followed
through it (`_evaluator`), and that is differentiated.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from florax import (
    _calls,
    _checks,
    _dependencies,
    _dimensions,
    _evaluator,
    _jaxprs,
    _keys,
    _leaves,
    _meshes,
    _sketches,
    _slots,
    _stored,
    _weights,
)


class Born(NamedTuple):
    """What the sketch of one leaf's gradient is made with.

    Attributes:
      leaf: the leaf, or of one with two sketches the part.
      keys: of its matrices in the cycle, or seeds, `(matrices, words)`, or what was drawn; of a
        dense leaf, none.
      sketches: what it will be added to.
    """

    leaf: _leaves.Leaf
    keys: jax.Array
    sketches: _sketches.Sketches


class Program(NamedTuple):
    """A traced loss and the parameters that it is differentiated by."""

    jaxpr: _jaxprs.Jaxpr
    consts: Sequence[Any]
    result: Callable[[Sequence[Any]], Any]  # what the loss returns, from the program's results
    leaves: list[jax.Array]
    treedef: Any
    paths: list[str]


def trace_loss(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int],
    has_aux: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    trace: Callable[..., Any] = _jaxprs.trace,
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
    results: list[Callable[[Sequence[Any]], Any]] = []

    def loss(params: Any) -> Any:
        replaced = list(args)
        for number, value in zip(numbers, params if several else (params,), strict=True):
            replaced[number] = value
        arrays, result = arrays_of(loss_fn(*replaced, **kwargs), has_aux)
        results.append(result)
        return arrays

    flat, treedef = jax.tree.flatten(params)
    paths = _dimensions.names(params)
    for path, leaf in zip(paths, flat, strict=True):
        _, dtype = _leaves.shape_and_dtype(path, leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{path} has dtype {dtype}; only real floating-point leaves have a gradient. "
                "Differentiate by the others alone: split the model by nnx.split(model, nnx.Param, "
                "...) or eqx.partition(model, eqx.is_inexact_array), and name the argument by "
                "argnums."
            )
    jaxpr, consts, _ = trace(loss, params)
    return Program(jaxpr, consts, results[-1], flat, treedef, paths)


def arrays_of(result: Any, has_aux: bool) -> tuple[list[jax.Array], Callable[[Sequence[Any]], Any]]:
    """The loss, and the arrays of what comes with it; and the result again from those."""
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(f"With has_aux=True the loss must return a pair (loss, aux), got {result}.")
    value, aux = result if has_aux else (result, ())
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        shown = f"an array of shape {value.shape} and dtype {value.dtype}"
        is_loss = not value.shape and jnp.issubdtype(value.dtype, jnp.floating)
    else:
        shown, is_loss = value, isinstance(value, float)
    if not is_loss:
        raise TypeError(
            f"The loss must be a real scalar, got {shown}. Return one number, and what else is "
            "wanted as aux, with has_aux=True."
        )
    flat, treedef = jax.tree.flatten(aux)
    is_array = [isinstance(x, jax.Array) for x in flat]

    def again(arrays: Sequence[Any]) -> Any:
        value, *rest = arrays
        own = iter(rest)
        # Texts and numbers in aux are handed on as they are, as `jax.value_and_grad` does.
        filled = [next(own) if a else x for x, a in zip(flat, is_array, strict=True)]
        aux = jax.tree.unflatten(treedef, filled)
        return (value, aux) if has_aux else value

    return [jnp.asarray(value), *(x for x in flat if isinstance(x, jax.Array))], again


def born(tx: optax.GradientTransformation, opt_state: Any, program: Program) -> dict[int, Born]:
    """By number of the leaf, what its sketch is made with, for all that `tx` compresses first."""
    numbers = {path: i for i, path in enumerate(program.paths)}
    params = jax.tree.unflatten(program.treedef, program.leaves)
    seen = _calls.look(tx, opt_state, params)
    check_first(seen)
    found: dict[int, Born] = {}
    for own in (own for seen in seen if seen.is_first for own in with_keys(seen.sketch)):
        of = numbers.get(own.leaf.of)
        if of is None or jnp.shape(program.leaves[of]) != own.leaf.shape:
            raise ValueError(
                f"opt_state was made for parameters with {own.leaf.of} of shape "
                f"{own.leaf.shape}, which what is differentiated has not: {program.paths}. Pass "
                "the state of these parameters, or their argnums."
            )
        if own.leaf.rank:
            found[number_of(own.leaf, numbers)] = own
    return found


def number_of(part: _leaves.Leaf, numbers: Mapping[str, int]) -> int:
    """Of a part, from those of all leaves: behind these, if it is the second of its leaf."""
    return numbers[part.of] + len(numbers) * part.is_across


def check_first(seen: Sequence[_calls.Seen], all_of_them: bool = False) -> None:
    """Raise unless a FLORA transformation, or all of them, see the gradients first."""
    first = [own.is_first for own in seen]
    if not any(first) or (all_of_them and not all(first)):
        raise ValueError(
            "tx has no FLORA transformation that sees the gradients before anything else does. "
            "Pass a flora_accumulate, or a flora_momentum(..., residual=False) that stands first; "
            "what must see full gradients needs jax.value_and_grad."
        )


def with_keys(sketches: _sketches.Sketches) -> list[Born]:
    """Per part what its sketch is made with in the cycle; dense ones too."""
    keys, none = sketches.keys(), jnp.zeros((1, 2), jnp.uint32)
    return [Born(part, keys.get(part.path, none), sketches) for part in sketches.parts]


def differentiate(
    program: Program,
    found: dict[int, Born],
    totals: dict[int, jax.Array],
    slots: Mapping[int, _slots.Slot] = MappingProxyType({}),
) -> tuple[list[jax.Array], dict[int, jax.Array], dict[int, jax.Array]]:
    """Results, sketches and dense gradients, by number of the leaf, of a traced loss.

    To `totals` the sketches of the leaves in `found` are added, in place where XLA may; those of
    leaves that have `slots` are added to what is there.
    """
    dense = {i: leaf for i, leaf in enumerate(program.leaves) if i not in found}

    def loss(carriers: dict[int, jax.Array], dense: dict[int, jax.Array], pulse: jax.Array) -> Any:
        own = {i: dataclasses.replace(slot, pulse=pulse) for i, slot in slots.items()}
        (value, *aux), carriers, _ = _evaluate(program, found, carriers, dense, own)
        return (value, carriers), aux

    found = _with_projections(program, found)
    carriers = {
        number: _meshes.varying_as(jnp.zeros_like(total), total) for number, total in totals.items()
    }
    (value, _), pull, aux = jax.vjp(loss, carriers, dense, jnp.zeros([]), has_aux=True)
    sketches, grads, _ = pull((jnp.ones_like(value), totals))
    return [value, *aux], sketches, grads


# What is drawn in one call: whatever of it is not needed yet, or not any more, is in the way.
_DRAWN_TOGETHER = 2**25


def _with_projections(program: Program, found: dict[int, Born]) -> dict[int, Born]:
    """With projections in the place of the keys of single matrices, drawn many in one call.

    Where layers are not stacked there are hundreds of them, and a draw at every use would take most
    of the time to compile. Those are together that the loss reads one after the other.
    """
    place = _dependencies.first_reads(program.jaxpr)
    numbers = sorted(
        (i for i, own in found.items() if own.leaf.rank and not own.leaf.batch),
        key=lambda i: place[i % len(place)],
    )
    if not numbers:
        return found
    keys = jnp.concatenate([found[i].keys for i in numbers])
    drawn = _keys.draw_all([found[i].leaf for i in numbers], keys, _DRAWN_TOGETHER)
    pairs = zip(numbers, drawn, strict=True)
    return {**found, **{i: found[i]._replace(keys=a) for i, a in pairs}}


def obstacles(program: Program, found: dict[int, Born]) -> dict[int, tuple[str, ...]]:
    """By number of the leaf the uses whose cotangents are dense for a moment, and where."""
    notes: dict[int, tuple[str, ...]] = {}

    def probe() -> None:
        carriers = {i: jnp.zeros(own.leaf.stored_shape) for i, own in found.items()}
        _, _, own = _evaluate(program, found, carriers, dict(enumerate(program.leaves)), {})
        count = len(program.leaves)
        notes.update({i: tuple(reasons) for i, reasons in own.items() if i < count})

    jax.eval_shape(probe)
    return notes


def _evaluate(
    program: Program,
    found: dict[int, Born],
    carriers: dict[int, jax.Array],
    dense: dict[int, jax.Array],
    slots: dict[int, _slots.Slot],
) -> tuple[list[Any], dict[int, jax.Array], dict[int, dict[str, None]]]:
    """Results of the loss, the carriers after their last use, and notes on dense uses."""
    # What is only reported is not differentiated.
    is_loss = [number == 0 for number in range(len(program.jaxpr.outvars))]
    wanted, findings = _dependencies.wanted(program.jaxpr, tuple(is_loss)), _evaluator.Findings()
    evaluator = _evaluator.Evaluator(dict(carriers), slots, wanted, findings)
    params: list[Any] = []
    for number, leaf in enumerate(program.leaves):
        if number in found:
            parts = [i for i in (number, number + len(program.leaves)) if i in found]
            born = [(i, found[i].leaf, found[i].keys) for i in parts]
            params.append(_weights.Weight.of(jnp.asarray(leaf), born))
        else:
            params.append(dense[number])
    # What is not scanned over once has all of its uses added up before it is written.
    scanned = _dependencies.scanned_once(program.jaxpr) if slots else ()
    evaluator.begin(itertools.compress(params, (not own for own in scanned)))
    value, *aux = evaluator.run(program.jaxpr, program.consts, *params)
    (value,) = evaluator.plain([value], "the loss itself")
    return [value, *_weights.arrays(aux)], evaluator.returned(), findings.notes


def value_and_grad(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    r"""As `jax.value_and_grad`, with compressed leaves' gradients born as sketches.

    For a product y = x W the gradient xᵀ dy and its sketch are

    .. math::
        C = (x^\top\, dy)\, A^\top = x^\top (dy\, A^\top),

    and the right-hand side is fewer operations than the gradient itself, which never exists. The
    model needs no change: the loss is traced, and where one of its products consumes a compressed
    weight, the backward pass makes the sketch. It sees through jit, `jax.checkpoint`, conditionals,
    scans over stacked weights, casts, transposes, reshapes, slices, concatenations and factors; a
    product may be a lookup, a sum, or a sum of squares; the uses of a tied weight add up. A use of
    any other kind makes a dense gradient of that use alone, which is compressed on the spot: never
    a wrong number. `gradient_report` says beforehand which those are, and why.

    Args:
      loss_fn: a function whose result is a real scalar, or a pair of it and anything else.
      tx: the optimizer that the gradients are for: a `flora_accumulate`, a `flora_momentum` without
        its residual that stands first, or what begins with one (chains, masks, partitions of them).
      argnums: which positional arguments to differentiate by: what `tx.init` was given; with
        several, the tuple of them.
      has_aux: whether `loss_fn` returns a pair `(loss, aux)`.

    Returns:
      A function of the arguments of `loss_fn` and of `opt_state`, a keyword: the state of `tx`. It
      returns what `jax.value_and_grad` does, with a `Sketch` in the place of each compressed
      gradient: equal to the compressed gradient to rounding. The sketches are drawn for the state's
      current cycle: pass them to `tx.update` with that very state.

    Raises:
      ValueError: no FLORA transformation of `tx` sees gradients first, or `opt_state` was made for
        other parameters.
      TypeError: the loss is not a real scalar, or a parameter is not of a floating-point dtype.

    >>> import florax, jax, jax.numpy as jnp, optax
    >>> tx = florax.flora_accumulate(optax.adafactor(1e-3), every_k_schedule=4, rank=16)
    >>> params = {"kernel": jnp.ones((512, 256)), "bias": jnp.zeros(256)}
    >>> loss_fn = lambda params, x: jnp.mean((x @ params["kernel"] + params["bias"]) ** 2)
    >>> @jax.jit
    ... def micro_step(params, state, x):
    ...     loss, grads = florax.value_and_grad(loss_fn, tx)(params, x, opt_state=state)
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
        found = born(tx, opt_state, program)
        totals = {}
        for i, how in found.items():
            dtype = jnp.promote_types(how.leaf.dtype, jnp.float32)
            like = program.leaves[i % len(program.leaves)]
            totals[i] = _stored.read(how.leaf.zeros(like, dtype))
        results, sketches, dense = differentiate(program, found, totals)
        grads: list[Any] = [dense.get(i) for i in range(len(program.leaves))]
        for own in {id(born.sketches): born.sketches for born in found.values()}.values():
            count = len(program.leaves)
            numbers = [i for i, born in found.items() if born.sketches is own and i < count]
            paths = {leaf.path: leaf for leaf in own.plan}
            leaves = [paths[program.paths[i]] for i in numbers]
            arrays = [
                (sketches[i], sketches[i + count]) if i + count in sketches else sketches[i]
                for i in numbers
            ]
            for i, sketch in zip(numbers, own.stamped(arrays, leaves), strict=True):
                grads[i] = sketch
        return program.result(results), jax.tree.unflatten(program.treedef, grads)

    return value_and_grad_fn
