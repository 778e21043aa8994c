"""Gradients that are born compressed: `value_and_grad` for any JAX function.

The loss is traced and its program evaluated again, with the weights to be compressed followed
through it as `_views.View`s. Where a product consumes one, its backward pass yields the sketch; a
weight that is used in a way the evaluator does not know keeps its dense gradient.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from florax import _accumulate, _checks, _jaxprs, _leaves, _meshes, _momentum, _sketches, _views


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Weight:
    """What a weight has become at some point of the program: a value, and how it is a view.

    A pytree, so that it can be handed into scans and checkpoints.
    """

    array: jax.Array
    source: _views.Source
    number: int = dataclasses.field(metadata={"static": True})  # of the leaf
    view: _views.View = dataclasses.field(metadata={"static": True})

    def keys(self) -> jax.Array:
        """The keys of the matrices in view, shape `(matrices, 2)`."""
        count = math.prod(self.view.shape[axis] for axis in self.view.batch)
        return self.source.keys[self.view.first_key : self.view.first_key + count]

    def at(
        self, index: jax.Array, axis: int, array: jax.Array, keys: jax.Array, first_key: int = 0
    ) -> "_Weight":
        """One position along a batch axis, with its value and keys."""
        source = _views.Source(keys, (*self.source.positions, index))
        view = dataclasses.replace(self.view.index(axis), first_key=first_key)
        return dataclasses.replace(self, array=array, source=source, view=view)


class Born(NamedTuple):
    """What the sketch of one leaf's gradient is made with.

    Attributes:
      leaf: the leaf.
      keys: of its matrices in the cycle, shape `(matrices, 2)`.
    """

    leaf: _leaves.Leaf
    keys: jax.Array


@dataclasses.dataclass
class _Evaluator:
    """Evaluates a traced program with some of its values being weights.

    `totals` holds per weight the value that its uses pass on from one to the next (see
    `_views.record`); inner programs get evaluators of their own. `refused` says of every weight
    that was used in an unknown way which operation it was, and `line` which line of the user's
    program has led here.
    """

    totals: dict[int, jax.Array]
    refused: dict[int, str]
    line: str = ""

    def run(self, jaxpr: _jaxprs.Jaxpr, consts: Sequence[Any], *args: Any) -> list[Any]:
        env: dict[Any, Any] = {}
        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        for equation in jaxpr.eqns:
            values = _jaxprs.read(env, equation.invars)
            env.update(zip(equation.outvars, self.equation(equation, values), strict=True))
        return _jaxprs.read(env, jaxpr.outvars)

    def equation(self, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
        reason = ""
        if any(isinstance(value, _Weight) for value in values):
            if not _jaxprs.has_gradient(equation):
                arrays = [value.array if isinstance(value, _Weight) else value for value in values]
                return _jaxprs.run(equation, arrays)
            rule = _RULES.get(equation.primitive.name)
            if rule is not None:
                try:
                    return rule(self, equation, values)
                except _views.Opaque as opaque:
                    reason = f", which {opaque}"
        return _jaxprs.run(equation, self.plain(values, self.where(equation) + reason))

    def plain(self, values: Sequence[Any], reason: str) -> list[Any]:
        """The values as arrays; weights among them are refused for that reason."""
        for value in values:
            if isinstance(value, _Weight):
                self.refused.setdefault(value.number, reason)
        return [value.array if isinstance(value, _Weight) else value for value in values]

    def where(self, equation: _jaxprs.Equation) -> str:
        """The operation's name and the line of the user's program that it comes from."""
        return f"{equation.primitive.name} at {_jaxprs.line(equation) or self.line}"

    def inside(self, values: Sequence[Any]) -> dict[int, jax.Array]:
        """The totals that an inner program needs which gets these values."""
        numbers = {value.number for value in values if isinstance(value, _Weight)}
        return {number: self.totals[number] for number in sorted(numbers)}

    def entered(self, totals: dict[int, jax.Array]) -> "_Evaluator":
        return _Evaluator(dict(totals), self.refused, self.line)


def _jit(ev: _Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    called = _Evaluator(ev.totals, ev.refused, _jaxprs.line(equation) or ev.line)
    return called.run(*_jaxprs.inner(equation), *values)


def _checkpoint(ev: _Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    params = equation.params
    if params["differentiated"]:
        raise _views.Opaque("is a gradient already")
    jaxpr, consts = _jaxprs.inner(equation)
    sources = _jaxprs.forwarded(jaxpr)

    def body(totals: dict[int, jax.Array], values: list[Any]) -> Any:
        inner = ev.entered(totals)
        results = inner.run(jaxpr, consts, *values)
        computed = [r for r, source in zip(results, sources, strict=True) if source is None]
        return inner.plain(computed, f"{ev.where(equation)}, which returns it"), inner.totals

    body = jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])
    computed, totals = body(ev.inside(values), values)
    ev.totals.update(totals)
    results = iter(computed)
    return [next(results) if source is None else values[source] for source in sources]


def _scan(ev: _Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    params = equation.params
    parts = _jaxprs.scan(equation, values)
    first, last = len(parts.consts), len(parts.consts) + len(parts.carry)
    sources = _jaxprs.forwarded(parts.body)
    where = ev.where(equation)

    # What the loop carries unchanged is a constant of it; what else it carries is computed.
    constant = [sources[i] == first + i for i in range(len(parts.carry))]
    start = [
        value if stays else ev.plain([value], f"{where}, which changes it")[0]
        for value, stays in zip(parts.carry, constant, strict=True)
    ]
    stacks = [
        value
        if not isinstance(value, _Weight) or value.view.batch[:1] == (0,)
        else ev.plain([value], f"{where}, along an axis that is no batch axis")[0]
        for value in parts.xs
    ]
    moving = [value for value, stays in zip(start, constant, strict=True) if not stays]
    # A stacked result that is one of the stacks, unchanged, is not copied.
    through = [
        source - last
        if source is not None and source >= last and isinstance(stacks[source - last], _Weight)
        else None
        for source in sources[len(parts.carry) :]
    ]

    # The keys of all stacks side by side, shape (layers, keys of a layer, 2).
    weights = [stack for stack in stacks if isinstance(stack, _Weight)]
    keys = [weight.keys().reshape(params["length"], -1, 2) for weight in weights]
    starts = np.cumsum([0, *(own.shape[1] for own in keys)]).tolist()
    packed = jnp.concatenate(keys, axis=1) if keys else None

    def body(carry: Any, xs: Any) -> Any:
        moving, totals = carry
        index, layer_keys, slices = xs
        first_keys = iter(starts)
        inner = ev.entered(totals)
        moving_values = iter(moving)
        carried = [
            value if stays else next(moving_values)
            for value, stays in zip(start, constant, strict=True)
        ]
        sliced = [
            stack.at(index, 0, part, layer_keys, next(first_keys))
            if isinstance(stack, _Weight)
            else part
            for stack, part in zip(stacks, slices, strict=True)
        ]
        results = inner.run(parts.body, parts.body_consts, *parts.consts, *carried, *sliced)
        new = results[: len(carried)]
        new = [value for value, stays in zip(new, constant, strict=True) if not stays]
        collected = [
            value
            for value, source in zip(results[len(carried) :], through, strict=True)
            if source is None
        ]
        reason = f"{where}, which returns it"
        return (inner.plain(new, reason), inner.totals), inner.plain(collected, reason)

    xs = [stack.array if isinstance(stack, _Weight) else stack for stack in stacks]
    (moved, totals), collected = jax.lax.scan(
        body,
        (moving, ev.inside([*parts.consts, *start, *stacks])),
        (jnp.arange(params["length"], dtype=jnp.int32), packed, xs),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    ev.totals.update(totals)
    moved_values, collected_values = iter(moved), iter(collected)
    return [
        *(
            value if stays else next(moved_values)
            for value, stays in zip(start, constant, strict=True)
        ),
        *(next(collected_values) if i is None else stacks[i] for i in through),
    ]


def _cond(ev: _Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    index, *operands = values

    def branch(jaxpr: Any) -> Callable[..., Any]:
        def body(totals: dict[int, jax.Array], operands: list[Any]) -> Any:
            inner = ev.entered(totals)
            results = inner.run(*_jaxprs.opened(jaxpr), *operands)
            return inner.plain(results, f"{ev.where(equation)}, which returns it"), inner.totals

        return body

    branches = [branch(jaxpr) for jaxpr in equation.params["branches"]]
    results, totals = jax.lax.switch(index, branches, ev.inside(operands), operands)
    ev.totals.update(totals)
    return list(results)


def _dot_general(ev: _Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    left, right = values
    if isinstance(left, _Weight) and isinstance(right, _Weight):
        raise _views.Opaque("multiplies two weights")
    weight, other = (right, left) if isinstance(right, _Weight) else (left, right)
    if not jnp.issubdtype(other.dtype, jnp.floating):
        raise _views.Opaque(f"multiplies it with {other.dtype}")
    product = _views.Product.of(
        weight.view,
        other.ndim,
        equation.params["dimension_numbers"],
        weight is right,
        equation.params["precision"],
    )
    operands = [value.array if value is weight else value for value in values]
    (output,) = _jaxprs.run(equation, operands)
    return [_record(ev, weight, product, output, other)]


def _gather(ev: _Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    weight, indices = values
    if not isinstance(weight, _Weight) or isinstance(indices, _Weight):
        raise _views.Opaque("indexes by it")
    lookup = _views.Lookup.of(weight.view, indices.ndim, equation.params)
    (output,) = _jaxprs.run(equation, [weight.array, indices])
    return [_record(ev, weight, lookup, output, indices)]


def _record(
    ev: _Evaluator,
    weight: _Weight,
    use: _views.Product | _views.Lookup,
    output: jax.Array,
    other: jax.Array,
) -> jax.Array:
    total = ev.totals[weight.number]
    output, ev.totals[weight.number] = _views.record(use, output, other, total, weight.source)
    return output


def _unchanged(ev: _Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    """Operations that change neither the axes nor, in effect, the values."""
    (weight,) = values
    (array,) = _jaxprs.run(equation, [weight.array])
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise _views.Opaque(f"casts it to {array.dtype}")
    return [dataclasses.replace(weight, array=array)]


def _viewed(weight: _Weight, equation: _jaxprs.Equation, view: _views.View) -> list[Any]:
    (array,) = _jaxprs.run(equation, [weight.array])
    return [dataclasses.replace(weight, array=array, view=view)]


def _transpose(ev: _Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    (weight,) = values
    return _viewed(weight, equation, weight.view.transpose(equation.params["permutation"]))


def _reshape(ev: _Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    """`reshape`, `squeeze` and `expand_dims`: the new shape is that of the result."""
    weight, *sizes = values
    if sizes:
        raise _views.Opaque("has a shape that is not known when tracing")
    if equation.params.get("dimensions") and equation.primitive.name == "reshape":
        raise _views.Opaque("reorders axes")
    (array,) = _jaxprs.run(equation, [weight.array])
    return [dataclasses.replace(weight, array=array, view=weight.view.reshape(array.shape))]


def _broadcast(ev: _Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    weight, *sizes = values
    shape = equation.params["shape"]
    axes = equation.params["broadcast_dimensions"]
    if sizes or np.prod(shape) != np.prod(weight.view.shape) or list(axes) != sorted(axes):
        raise _views.Opaque("repeats it")
    return _viewed(weight, equation, weight.view.reshape(shape))


def _slice(ev: _Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    (weight,) = values
    params = equation.params
    starts, limits = params["start_indices"], params["limit_indices"]
    if params["strides"] is not None and any(stride != 1 for stride in params["strides"]):
        raise _views.Opaque("skips entries")
    return _block(weight, equation, [weight.array], starts, limits)


def _split(ev: _Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    (weight,) = values
    axis, shape = equation.params["axis"], weight.view.shape
    views, start = [], 0
    for size in equation.params["sizes"]:
        starts = [start if i == axis else 0 for i in range(len(shape))]
        limits = [start + size if i == axis else n for i, n in enumerate(shape)]
        views.append(weight.view.slice(starts, limits))
        start += size
    arrays = _jaxprs.run(equation, [weight.array])
    return [
        dataclasses.replace(weight, array=array, view=view)
        for array, view in zip(arrays, views, strict=True)
    ]


def _dynamic_slice(ev: _Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    weight, *starts = values
    if not isinstance(weight, _Weight):
        raise _views.Opaque("slices by it")
    sizes = equation.params["slice_sizes"]
    limits = [start + size for start, size in zip(starts, sizes, strict=True)]
    return _block(weight, equation, [weight.array, *starts], starts, limits)


def _block(
    weight: _Weight,
    equation: _jaxprs.Equation,
    operands: list[Any],
    starts: Sequence[Any],
    limits: Sequence[Any],
) -> list[Any]:
    """A block of a weight; along its first batch axis a single position."""
    (array,) = _jaxprs.run(equation, operands)
    view = weight.view
    axis = view.batch[0] if view.batch else None
    whole = [size == n for size, n in zip(array.shape, view.shape, strict=True)]
    if axis is not None and not whole[axis] and array.shape[axis] == 1:
        # As JAX does, out of range is the nearest: the key must be that of the layer that is read.
        index = jnp.clip(jnp.asarray(starts[axis], jnp.int32), 0, view.shape[axis] - 1)
        keys = weight.keys().reshape(view.shape[axis], -1, 2)[index]
        taken = weight.at(index, axis, array, keys)
        # The axis stays, with size 1, and is no batch axis any more.
        without = [n for i, n in enumerate(view.shape) if i != axis]
        rest = [i for i in range(len(view.shape)) if i != axis]
        if any(not whole[i] for i in rest):
            raise _views.Opaque("takes a part of a layer")
        shape = (*without[:axis], 1, *without[axis:])
        return [dataclasses.replace(taken, view=taken.view.reshape(shape))]
    fixed = [0 if full else start for full, start in zip(whole, starts, strict=True)]
    if not all(isinstance(start, int | np.integer) for start in fixed):
        raise _views.Opaque("takes a part of it that is not known when tracing")
    ends = [start + size for start, size in zip(fixed, array.shape, strict=True)]
    return [dataclasses.replace(weight, array=array, view=view.slice(fixed, ends))]


Rule: TypeAlias = Callable[[_Evaluator, _jaxprs.Equation, list[Any]], list[Any]]
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_jaxprs.JIT, _jit),
    **dict.fromkeys(_jaxprs.CHECKPOINT, _checkpoint),
    **dict.fromkeys(("convert_element_type", "copy", "name", "pvary", "pcast"), _unchanged),
    **dict.fromkeys(("sharding_constraint", "reshard"), _unchanged),
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    "scan": _scan,
    "cond": _cond,
    "dot_general": _dot_general,
    "gather": _gather,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "split": _split,
    "dynamic_slice": _dynamic_slice,
}


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
    evaluator = _Evaluator(dict(carriers), {})
    params: list[Any] = []
    for number, leaf in enumerate(program.leaves):
        if number in sketched:
            how = sketched[number]
            view = _views.View.of(how.leaf)
            source = _views.Source(how.keys, ())
            params.append(_Weight(jnp.asarray(leaf), source, number, view))
        else:
            params.append(dense[number])
    value, *aux = evaluator.run(program.jaxpr, program.consts, *params)
    (value,) = evaluator.plain([value], "the loss itself")
    # What is only reported is not differentiated: a weight may stand there.
    aux = [leaf.array if isinstance(leaf, _Weight) else leaf for leaf in aux]
    return [value, *aux], evaluator.totals, evaluator.refused


def value_and_grad(
    loss_fn: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    r"""As `jax.value_and_grad`, with compressed leaves' gradients born as sketches.

    For a product y = x W the gradient xᵀ dy and its sketch are

    .. math::
        C = (x^\top\, dy)\, A^\top = x^\top (dy\, A^\top),

    and the right-hand side is fewer operations than the gradient itself, which never exists. The
    model needs no change: the loss is traced, and where one of its products consumes a compressed
    weight, the backward pass makes the sketch. It sees through jit, `jax.checkpoint`, scans over
    stacked weights, casts, transposes, reshapes and slices; the uses of a tied weight add up. A
    weight that is used in any other way keeps its dense gradient, which the transformation then
    compresses: never a wrong number. `gradient_report` says beforehand which those are, and why.

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
