"""A traced program evaluated again with its weights followed through it.

The one place that knows which operations a weight can be followed through. Where one is used in a
product, a lookup or a sum, the backward pass of that use is made to yield its sketch
(`_uses.record`). Any other operation gets the weight as an array whose cotangent, of full size for
a moment, is compressed on the spot; `notes` says which those are.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from florax import (
    _convolutions,
    _dependencies,
    _jaxprs,
    _lookups,
    _meshes,
    _pieces,
    _products,
    _slots,
    _uses,
    _views,
    _weights,
)


@dataclasses.dataclass
class Findings:
    """What is shared by the evaluators of a program and of the programs in it.

    Attributes:
      notes: by number of the leaf the uses that need a dense cotangent, in their order.
      calls: the inner programs that were made, so that each is traced once.
    """

    notes: dict[int, dict[str, None]] = dataclasses.field(default_factory=dict)
    calls: dict[Any, Callable[..., Any]] = dataclasses.field(default_factory=dict)


Inside: TypeAlias = tuple[dict[int, jax.Array], dict[int, _slots.Slot]]


def _pieces_of(values: Iterable[Any]) -> list[_pieces.Piece]:
    return [piece for own in values if isinstance(own, _weights.Weight) for piece in own.pieces]


@dataclasses.dataclass
class Evaluator:
    """Evaluates a traced program with some of its values being weights.

    Attributes:
      totals: per weight the value that its uses pass on from one to the next (`_uses.record`);
        inner programs get evaluators of their own.
      slots: per weight, where there is no total yet, what one is written into.
      wanted: the variables of the program through which gradients reach the loss.
      found: what is shared.
      line: which line of the user's program has led here.
      given: the weights whose totals go on after the program.
    """

    totals: dict[int, jax.Array]
    slots: dict[int, _slots.Slot]
    wanted: frozenset[Any]
    found: Findings
    line: str = ""
    given: tuple[int, ...] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.given = tuple(self.totals)

    def run(self, jaxpr: _jaxprs.Jaxpr, consts: Sequence[Any], *args: Any) -> list[Any]:
        return _jaxprs.evaluate(jaxpr, consts, args, self.equation)

    def equation(self, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
        if not any(isinstance(value, _weights.Weight) for value in values):
            return _jaxprs.run(equation, values)
        if not any(self.chosen(equation.outvars)) or not _jaxprs.has_gradient(equation):
            return _jaxprs.run(equation, _weights.arrays(values))
        name, reason = equation.primitive.name, ""
        try:
            with _meshes.entered(_jaxprs.mesh(equation)):
                if name in _weights.RULES:
                    return _weights.RULES[name](equation, values)
                if name in _RULES:
                    return _RULES[name](self, equation, values)
        except _views.Opaque as opaque:
            reason = f", which {opaque}"
        return _jaxprs.run(equation, self.plain(values, self.where(equation) + reason))

    def plain(
        self, values: Sequence[Any], reason: str, wanted: Iterable[bool] = itertools.repeat(True)
    ) -> list[Any]:
        """The values as arrays; those of weights that are wanted have cotangents, for a reason."""
        return [
            self._dense(value, reason)
            if isinstance(value, _weights.Weight) and is_wanted
            else _weights.arrays([value])[0]
            for value, is_wanted in zip(values, wanted, strict=False)
        ]

    def _dense(self, weight: _weights.Weight, reason: str) -> jax.Array:
        """A weight as an array, whose cotangent is compressed."""
        whole = _products.Product.sum(weight.array.ndim, ())
        return self.record(weight, whole, weight.array, None, reason)

    def record(
        self, weight: _weights.Weight, use: _uses.Use, output: jax.Array, other: Any, where: str
    ) -> jax.Array:
        """The result of a use, which from now on yields its sketch."""
        for piece in weight.pieces:
            use.check(piece, weight.array.shape)
            if use.is_dense(piece.view):
                self.found.notes.setdefault(piece.number, {})[where] = None
        operands = _uses.Operands(other, weight.root, weight.sources)
        self.begin([weight])
        totals, _ = self.inside([weight])
        output, totals = _uses.record(use, weight.pieces, output, totals, operands)
        self.totals.update(totals)
        return output

    def where(self, equation: _jaxprs.Equation) -> str:
        """The operation's name and the line of the user's program that it comes from."""
        return f"{equation.primitive.name} at {_jaxprs.line(equation) or self.line}"

    def begin(self, values: Iterable[Any]) -> None:
        """Begin the totals of weights that have none yet, for all uses from here on."""
        for piece in _pieces_of(values):
            if piece.number in self.slots:
                whole = _views.View.of(piece.view.leaf)
                _, self.totals[piece.number] = self.slots.pop(piece.number).total(whole, ())

    def inside(self, values: Sequence[Any]) -> Inside:
        """The totals and slots that an inner program needs which gets these values."""
        numbers = sorted({piece.number for piece in _pieces_of(values)})
        return (
            {number: self.totals[number] for number in numbers if number in self.totals},
            {number: self.slots[number] for number in numbers if number in self.slots},
        )

    def entered(
        self,
        equation: _jaxprs.Equation,
        jaxpr: _jaxprs.Jaxpr,
        results: Sequence[bool],
        inside: Inside,
    ) -> "Evaluator":
        """For an inner program, of which some results are wanted."""
        wanted = _dependencies.wanted(jaxpr, tuple(results))
        line = _jaxprs.line(equation) or self.line
        totals, slots = inside
        return Evaluator(dict(totals), dict(slots), wanted, self.found, line)

    def returned(self) -> dict[int, jax.Array]:
        """Those totals that were given; others end here."""
        return {number: self.totals[number] for number in self.given}

    def chosen(self, variables: Sequence[Any]) -> tuple[bool, ...]:
        """Which of the variables are wanted."""
        return tuple(var in self.wanted for var in variables)


# --- programs in programs


def _jit(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    """As a jit again: it keeps its mesh and shardings, and what is called twice is traced once."""
    params, (jaxpr, consts) = equation.params, _jaxprs.inner(equation)
    if any(layout is not None for layout in _jaxprs.layouts(equation)):
        raise _views.Opaque("fixes layouts")
    sources, results = _dependencies.forwarded(jaxpr), ev.chosen(equation.outvars)
    key = (jaxpr, results, params.get("in_shardings"), params.get("out_shardings"))
    if key not in ev.found.calls:

        def body(inside: Inside, values: list[Any]) -> Any:
            inner = ev.entered(equation, jaxpr, results, inside)
            divided = map(_divided, values, _jaxprs.shardings(equation, "in_shardings"))
            computed = inner.run(jaxpr, consts, *divided)
            divided = map(_divided, computed, _jaxprs.shardings(equation, "out_shardings"))
            return _own(list(divided), sources), inner.returned()

        body.__name__ = str(params.get("name", "call"))
        ev.found.calls[key] = jax.jit(body)
    with _meshes.entered(params.get("ctx_mesh")):
        computed, totals = ev.found.calls[key](ev.inside(values), values)
    ev.totals.update(totals)
    return _forwarded(computed, sources, values)


def _divided(value: Any, sharding: Any) -> Any:
    if sharding is None:
        return value
    if isinstance(value, _weights.Weight):
        return dataclasses.replace(value, array=_divided(value.array, sharding))
    constrain: Callable[..., jax.Array] = jax.lax.with_sharding_constraint
    return constrain(value, sharding)


def _own(results: list[Any], sources: Sequence[int | None]) -> list[Any]:
    return [r for r, source in zip(results, sources, strict=True) if source is None]


def _forwarded(
    computed: Sequence[Any], sources: Sequence[int | None], values: Sequence[Any]
) -> list[Any]:
    """All results, where those that are operands, unchanged, are not among the computed."""
    results = iter(computed)
    return [next(results) if source is None else values[source] for source in sources]


def _checkpoint(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    params = equation.params
    if params["differentiated"]:
        raise _views.Opaque("is a gradient already")
    jaxpr, consts = _jaxprs.inner(equation)
    sources, results = _dependencies.forwarded(jaxpr), ev.chosen(equation.outvars)

    @functools.partial(jax.checkpoint, prevent_cse=params["prevent_cse"], policy=params["policy"])
    def body(inside: Inside, values: list[Any]) -> Any:
        inner = ev.entered(equation, jaxpr, results, inside)
        return _own(inner.run(jaxpr, consts, *values), sources), inner.returned()

    computed, totals = body(ev.inside(values), values)
    ev.totals.update(totals)
    return _forwarded(computed, sources, values)


def _scan(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    params = equation.params
    parts = _jaxprs.scan(equation, values)
    first, last = len(parts.consts), len(parts.consts) + len(parts.carry)
    sources = _dependencies.forwarded(parts.body)
    wanted = _dependencies.wanted_of_body(equation, ev.chosen(equation.outvars))
    where = ev.where(equation)

    # What the loop carries unchanged is a constant of it; what else it carries is computed.
    constant = [sources[i] == first + i for i in range(len(parts.carry))]
    start = [
        value if stays else ev.plain([value], f"{where}, which changes it", [own])[0]
        for value, stays, own in zip(parts.carry, constant, wanted, strict=False)
    ]
    stacks = [
        value
        if not isinstance(value, _weights.Weight) or value.is_stack()
        else ev.plain([value], f"{where}, along an axis that is no batch axis")[0]
        for value in parts.xs
    ]
    moving = [value for value, stays in zip(start, constant, strict=True) if not stays]
    # A stacked result that is one of the stacks, unchanged, is not copied.
    through = [
        source - last
        if source is not None
        and source >= last
        and isinstance(stacks[source - last], _weights.Weight)
        else None
        for source in sources[len(parts.carry) :]
    ]

    # A layer's part of an accumulator is written by itself, if no block of it is in another one.
    weights = [stack for stack in stacks if isinstance(stack, _weights.Weight)]
    counts = collections.Counter(piece.number for piece in _pieces_of(weights))
    ev.begin([*parts.consts, *start])
    ev.begin(own for own in weights if not own.can_be_written(ev.slots, counts))
    totals, slots = ev.inside([*parts.consts, *start, *stacks])

    # The keys of all stacks side by side, shape (layers, words of a layer): a slice and a copy a
    # layer, not one for every weight. They stay together until something is drawn: parts of them
    # would be values of a layer, which the loop keeps for its backward pass.
    keys = [own.reshape(len(own), -1) for weight in weights for own in weight.layer_keys()]
    packed = jnp.concatenate(keys, axis=1) if keys else None
    words = list(itertools.pairwise(itertools.accumulate((x.shape[1] for x in keys), initial=0)))

    def body(carry: Any, xs: Any) -> Any:
        moving, totals = carry
        index, layer_keys, slices = xs
        inner = ev.entered(equation, parts.body, wanted, (totals, {}))
        moving_values, own_words = iter(moving), iter(words)
        carried = [
            value if stays else next(moving_values)
            for value, stays in zip(start, constant, strict=True)
        ]
        sliced = [
            stack.at(index, own[0], own[1], layer_keys, own_words).written(slots, inner.totals)
            if isinstance(stack, _weights.Weight)
            else own
            for stack, own in zip(stacks, slices, strict=True)
        ]
        results = inner.run(parts.body, parts.body_consts, *parts.consts, *carried, *sliced)
        computed = [not stays for stays in constant] + [source is None for source in through]
        new = inner.plain(
            list(itertools.compress(results, computed)),
            f"{where}, which returns it",
            itertools.compress(wanted, computed),
        )
        return (new[: len(moving)], inner.returned()), new[len(moving) :]

    xs = [(own.array, own.root) if isinstance(own, _weights.Weight) else own for own in stacks]
    (moved, totals), collected = jax.lax.scan(
        body,
        (moving, totals),
        (jnp.arange(params["length"], dtype=jnp.int32), packed, xs),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    ev.totals.update(totals)
    moved_values = iter(moved)
    return [
        *(
            value if stays else next(moved_values)
            for value, stays in zip(start, constant, strict=True)
        ),
        *_forwarded(collected, through, stacks),
    ]


def _cond(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    index, *operands = values
    results = ev.chosen(equation.outvars)

    def branch(program: Any) -> Callable[..., Any]:
        jaxpr, consts = _jaxprs.opened(program)

        def body(totals: dict[int, jax.Array], operands: list[Any]) -> Any:
            inner = ev.entered(equation, jaxpr, results, (totals, {}))
            values = inner.run(jaxpr, consts, *operands)
            reason = f"{ev.where(equation)}, which returns it"
            return inner.plain(values, reason, results), inner.returned()

        return body

    branches = [branch(jaxpr) for jaxpr in equation.params["branches"]]
    ev.begin(operands)
    totals, _ = ev.inside(operands)
    computed, totals = jax.lax.switch(index, branches, totals, operands)
    ev.totals.update(totals)
    return list(computed)


# --- uses


def _dot_general(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    left, right = _weights.arrays(values)
    for other in (left, right):
        if not jnp.issubdtype(other.dtype, jnp.floating):
            raise _views.Opaque(f"multiplies it with {other.dtype}")
    uses = []
    for is_right, value in enumerate(values):
        if isinstance(value, _weights.Weight):
            other = left if is_right else right
            numbers, precision = (equation.params[k] for k in ("dimension_numbers", "precision"))
            use = _products.Product.dot(
                value.array.ndim, other.ndim, numbers, bool(is_right), precision
            )
            for piece in value.pieces:
                use.check(piece, value.array.shape)
            uses.append((value, use, other))
    (output,) = _jaxprs.run(equation, [left, right])
    # Of two weights the sketch of each is made with the other.
    for weight, use, other in uses:
        output = ev.record(weight, use, output, other, ev.where(equation))
    return [output]


def _gather(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    weight, indices = values
    if not isinstance(weight, _weights.Weight):
        raise _views.Opaque("indexes by it")
    use = _lookups.Lookup.gather(weight.array.shape, indices.ndim, equation.params)
    (output,) = _jaxprs.run(equation, _weights.arrays(values))
    return [ev.record(weight, use, output, indices[..., 0], ev.where(equation))]


def _convolution(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    other, weight = values
    if not isinstance(weight, _weights.Weight) or isinstance(other, _weights.Weight):
        raise _views.Opaque("is a convolution of it")
    use = _convolutions.Convolution.of_equation(weight.array.ndim, equation.params)
    (output,) = _jaxprs.run(equation, _weights.arrays(values))
    return [ev.record(weight, use, output, other, ev.where(equation))]


def _ragged(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    rows, weight, sizes = values
    if not isinstance(weight, _weights.Weight) or isinstance(rows, _weights.Weight):
        raise _views.Opaque("takes it for rows")
    use = _convolutions.Ragged.of_equation(equation.params)
    (output,) = _jaxprs.run(equation, _weights.arrays(values))
    return [ev.record(weight, use, output, (rows, sizes), ev.where(equation))]


def _reduce_sum(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    (weight,) = values
    axes, ndim = tuple(equation.params["axes"]), weight.array.ndim
    (output,) = _jaxprs.run(equation, [weight.array])
    if weight.root is None and all(
        piece.view.shape[axis] == 1 for piece in weight.pieces for axis in axes
    ):
        # Of weights side by side along an axis, that is the sum of them.
        return [weight.replace([p.squeeze(axes) for p in weight.pieces], array=output)]
    use = _products.Product.sum(ndim, axes)
    return [ev.record(weight, use, output, None, ev.where(equation))]


_RULES: dict[str, Callable[[Evaluator, _jaxprs.Equation, list[Any]], list[Any]]] = {
    **dict.fromkeys(_jaxprs.JIT, _jit),
    **dict.fromkeys(_jaxprs.CHECKPOINT, _checkpoint),
    "scan": _scan,
    "cond": _cond,
    "dot_general": _dot_general,
    "gather": _gather,
    "conv_general_dilated": _convolution,
    "ragged_dot_general": _ragged,
    "reduce_sum": _reduce_sum,
}
