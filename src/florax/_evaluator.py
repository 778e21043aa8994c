"""A traced program evaluated again with its weights followed through it.

The one place that knows which operations a weight can be followed through. Where a product or a
lookup consumes one, its backward pass is made to yield the sketch (`_views.record`); any other
operation gets the weight as an array, and the weight is refused: its gradient will be dense.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from florax import _jaxprs, _views


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
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
    ) -> "Weight":
        """One position along a batch axis, with its value and keys."""
        source = _views.Source(keys, (*self.source.positions, index))
        view = dataclasses.replace(self.view.index(axis), first_key=first_key)
        return dataclasses.replace(self, array=array, source=source, view=view)


@dataclasses.dataclass
class Evaluator:
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
        return _jaxprs.evaluate(jaxpr, consts, args, self.equation)

    def equation(self, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
        reason = ""
        if any(isinstance(value, Weight) for value in values):
            if not _jaxprs.has_gradient(equation):
                return _jaxprs.run(equation, arrays(values))
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
            if isinstance(value, Weight):
                self.refused.setdefault(value.number, reason)
        return arrays(values)

    def where(self, equation: _jaxprs.Equation) -> str:
        """The operation's name and the line of the user's program that it comes from."""
        return f"{equation.primitive.name} at {_jaxprs.line(equation) or self.line}"

    def inside(self, values: Sequence[Any]) -> dict[int, jax.Array]:
        """The totals that an inner program needs which gets these values."""
        numbers = {value.number for value in values if isinstance(value, Weight)}
        return {number: self.totals[number] for number in sorted(numbers)}

    def entered(self, totals: dict[int, jax.Array]) -> "Evaluator":
        return Evaluator(dict(totals), self.refused, self.line)


def arrays(values: Sequence[Any]) -> list[Any]:
    """The values, weights among them as what they have become."""
    return [value.array if isinstance(value, Weight) else value for value in values]


def _jit(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    called = Evaluator(ev.totals, ev.refused, _jaxprs.line(equation) or ev.line)
    return called.run(*_jaxprs.inner(equation), *values)


def _checkpoint(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
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


def _scan(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
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
        if not isinstance(value, Weight) or value.view.batch[:1] == (0,)
        else ev.plain([value], f"{where}, along an axis that is no batch axis")[0]
        for value in parts.xs
    ]
    moving = [value for value, stays in zip(start, constant, strict=True) if not stays]
    # A stacked result that is one of the stacks, unchanged, is not copied.
    through = [
        source - last
        if source is not None and source >= last and isinstance(stacks[source - last], Weight)
        else None
        for source in sources[len(parts.carry) :]
    ]

    # The keys of all stacks side by side, shape (layers, keys of a layer, 2).
    weights = [stack for stack in stacks if isinstance(stack, Weight)]
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
            if isinstance(stack, Weight)
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

    xs = arrays(stacks)
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


def _cond(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
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


def _dot_general(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    left, right = values
    if isinstance(left, Weight) and isinstance(right, Weight):
        raise _views.Opaque("multiplies two weights")
    weight, other = (right, left) if isinstance(right, Weight) else (left, right)
    if not jnp.issubdtype(other.dtype, jnp.floating):
        raise _views.Opaque(f"multiplies it with {other.dtype}")
    product = _views.Product.of(
        weight.view,
        other.ndim,
        equation.params["dimension_numbers"],
        weight is right,
        equation.params["precision"],
    )
    (output,) = _jaxprs.run(equation, arrays(values))
    return [_record(ev, weight, product, output, other)]


def _convolution(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    other, weight = values
    if not isinstance(weight, Weight) or isinstance(other, Weight):
        raise _views.Opaque("is a convolution of it")
    product, shape = _views.Product.of_patches(weight.view, other.shape, equation.params)
    (output,) = _jaxprs.run(equation, [other, weight.array])
    return [_record(ev, weight, product, output, other.reshape(shape))]


def _gather(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    weight, indices = values
    if not isinstance(weight, Weight) or isinstance(indices, Weight):
        raise _views.Opaque("indexes by it")
    lookup = _views.Lookup.of(weight.view, indices.ndim, equation.params)
    (output,) = _jaxprs.run(equation, [weight.array, indices])
    return [_record(ev, weight, lookup, output, indices)]


def _record(
    ev: Evaluator,
    weight: Weight,
    use: _views.Product | _views.Lookup,
    output: jax.Array,
    other: jax.Array,
) -> jax.Array:
    total = ev.totals[weight.number]
    output, ev.totals[weight.number] = _views.record(use, output, other, total, weight.source)
    return output


def _unchanged(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    """Operations that change neither the axes nor, in effect, the values."""
    (weight,) = values
    (array,) = _jaxprs.run(equation, [weight.array])
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise _views.Opaque(f"casts it to {array.dtype}")
    return [dataclasses.replace(weight, array=array)]


def _viewed(weight: Weight, equation: _jaxprs.Equation, view: _views.View) -> list[Any]:
    (array,) = _jaxprs.run(equation, [weight.array])
    return [dataclasses.replace(weight, array=array, view=view)]


def _transpose(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    (weight,) = values
    return _viewed(weight, equation, weight.view.transpose(equation.params["permutation"]))


def _reshape(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    """`reshape`, `squeeze` and `expand_dims`: the new shape is that of the result."""
    weight, *sizes = values
    if sizes:
        raise _views.Opaque("has a shape that is not known when tracing")
    if equation.params.get("dimensions") and equation.primitive.name == "reshape":
        raise _views.Opaque("reorders axes")
    (array,) = _jaxprs.run(equation, [weight.array])
    return [dataclasses.replace(weight, array=array, view=weight.view.reshape(array.shape))]


def _broadcast(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    weight, *sizes = values
    shape = equation.params["shape"]
    axes = equation.params["broadcast_dimensions"]
    if sizes or np.prod(shape) != np.prod(weight.view.shape) or list(axes) != sorted(axes):
        raise _views.Opaque("repeats it")
    return _viewed(weight, equation, weight.view.reshape(shape))


def _slice(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    (weight,) = values
    params = equation.params
    starts, limits = params["start_indices"], params["limit_indices"]
    if params["strides"] is not None and any(stride != 1 for stride in params["strides"]):
        raise _views.Opaque("skips entries")
    return _block(weight, equation, [weight.array], starts, limits)


def _split(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
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


def _dynamic_slice(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    weight, *starts = values
    if not isinstance(weight, Weight):
        raise _views.Opaque("slices by it")
    sizes = equation.params["slice_sizes"]
    limits = [start + size for start, size in zip(starts, sizes, strict=True)]
    return _block(weight, equation, [weight.array, *starts], starts, limits)


def _block(
    weight: Weight,
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


_Rule: TypeAlias = Callable[[Evaluator, _jaxprs.Equation, list[Any]], list[Any]]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_jaxprs.JIT, _jit),
    **dict.fromkeys(_jaxprs.CHECKPOINT, _checkpoint),
    **dict.fromkeys(("convert_element_type", "copy", "name", "pvary", "pcast"), _unchanged),
    **dict.fromkeys(("sharding_constraint", "reshard"), _unchanged),
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    "scan": _scan,
    "cond": _cond,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "split": _split,
    "dynamic_slice": _dynamic_slice,
}
