"""A traced program evaluated again with its weights followed through it.

The one place that knows which operations a weight can be followed through. Where one is used in a
product, a lookup or a sum, the backward pass of that use is made to yield its sketch
(`_uses.record`). Any other operation gets the weight as an array whose cotangent, of full size for
a moment, is compressed on the spot; `notes` says which those are.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from florax import _jaxprs, _meshes, _uses, _views


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """What weights have become at some point of the program: a value, and how it is a view of them.

    A pytree, so that it can be handed into inner programs and returned by them.

    Attributes:
      array: the value. Its gradient passes to what in it is no weight's.
      root: the value before it was squared and multiplied by factors with gradients; None if it was
        not.
      sources: per piece what its sketch is made with.
      pieces: the weights, and parts of them, that it consists of; they may overlap, as in a sum.
      is_pure: whether it consists of nothing else.
    """

    array: jax.Array
    root: jax.Array | None
    sources: tuple[_uses.Source, ...]
    pieces: tuple[_uses.Piece, ...] = dataclasses.field(metadata={"static": True})
    is_pure: bool = dataclasses.field(default=True, metadata={"static": True})

    @classmethod
    def of(cls, array: jax.Array, number: int, leaf: Any, keys: jax.Array) -> "Weight":
        """A weight itself, with the keys of its matrices."""
        piece = _uses.Piece(number, _views.View.of(leaf), (0,) * array.ndim)
        return cls(array, None, (_uses.Source(keys),), (piece,))

    def replace(self, views: Sequence[_views.View], **fields: Any) -> "Weight":
        """With other views of its pieces."""
        pieces = tuple(
            dataclasses.replace(piece, view=view)
            for piece, view in zip(self.pieces, views, strict=True)
        )
        return dataclasses.replace(self, pieces=pieces, **fields)

    def is_whole(self, axis: int) -> bool:
        """Whether all of its pieces go from end to end of an axis."""
        sizes = {piece.view.shape[axis] for piece in self.pieces}
        return sizes == {self.array.shape[axis]}

    def at(self, array: jax.Array, root: jax.Array | None, index: jax.Array) -> "Weight":
        """One position along the first axis, with its values."""
        views = [
            piece.view.place(0, 1, len(source.positions)).reshape(piece.view.shape[1:])
            for piece, source in zip(self.pieces, self.sources, strict=True)
        ]
        sources = tuple(own._replace(positions=(*own.positions, index)) for own in self.sources)
        taken = self.replace(views, array=array, root=root, sources=sources)
        pieces = (dataclasses.replace(p, offset=p.offset[1:]) for p in taken.pieces)
        return dataclasses.replace(taken, pieces=tuple(pieces))


@dataclasses.dataclass
class Findings:
    """What is shared by the evaluators of a program and of the programs in it.

    Attributes:
      notes: by number of the leaf the uses that need a dense cotangent, in their order.
      calls: the inner programs that were made, so that each is traced once.
    """

    notes: dict[int, dict[str, None]] = dataclasses.field(default_factory=dict)
    calls: dict[Any, Callable[..., Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Evaluator:
    """Evaluates a traced program with some of its values being weights.

    Attributes:
      totals: per weight the value that its uses pass on from one to the next (`_uses.record`);
        inner programs get evaluators of their own.
      wanted: the variables of the program through which gradients reach the loss.
      found: what is shared.
      line: which line of the user's program has led here.
    """

    totals: dict[int, jax.Array]
    wanted: frozenset[Any]
    found: Findings
    line: str = ""

    def run(self, jaxpr: _jaxprs.Jaxpr, consts: Sequence[Any], *args: Any) -> list[Any]:
        return _jaxprs.evaluate(jaxpr, consts, args, self.equation)

    def equation(self, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
        if not any(isinstance(value, Weight) for value in values):
            return _jaxprs.run(equation, values)
        if not any(self.chosen(equation.outvars)) or not _jaxprs.has_gradient(equation):
            return _jaxprs.run(equation, arrays(values))
        reason, rule = "", _RULES.get(equation.primitive.name)
        if rule is not None:
            try:
                with _meshes.entered(_jaxprs.mesh(equation)):
                    return rule(self, equation, values)
            except _views.Opaque as opaque:
                reason = f", which {opaque}"
        return _jaxprs.run(equation, self.plain(values, self.where(equation) + reason))

    def plain(self, values: Sequence[Any], reason: str) -> list[Any]:
        """The values as arrays; those of weights have cotangents, for that reason."""
        return [
            self.dense(value, reason) if isinstance(value, Weight) else value for value in values
        ]

    def dense(self, weight: Weight, reason: str) -> jax.Array:
        """A weight as an array, whose cotangent is compressed."""
        whole = _uses.Product.sum(weight.array.ndim, ())
        return self.record(weight, whole, weight.array, None, reason)

    def record(
        self, weight: Weight, use: _uses.Use, output: jax.Array, other: Any, where: str
    ) -> jax.Array:
        """The result of a use, which from now on yields its sketch."""
        for piece in weight.pieces:
            use.check(piece, weight.array.shape)
            if use.is_dense(piece.view):
                self.found.notes.setdefault(piece.number, {})[where] = None
        operands = _uses.Operands(other, weight.root, weight.sources)
        totals = self.inside([weight])
        output, totals = _uses.record(use, weight.pieces, output, totals, operands)
        self.totals.update(totals)
        return output

    def where(self, equation: _jaxprs.Equation) -> str:
        """The operation's name and the line of the user's program that it comes from."""
        return f"{equation.primitive.name} at {_jaxprs.line(equation) or self.line}"

    def inside(self, values: Sequence[Any]) -> dict[int, jax.Array]:
        """The totals that an inner program needs which gets these values."""
        weights = [value for value in values if isinstance(value, Weight)]
        numbers = {piece.number for weight in weights for piece in weight.pieces}
        return {number: self.totals[number] for number in sorted(numbers)}

    def entered(
        self,
        equation: _jaxprs.Equation,
        jaxpr: _jaxprs.Jaxpr,
        results: Sequence[bool],
        totals: dict[int, jax.Array],
    ) -> "Evaluator":
        """For an inner program, of which some results are wanted."""
        wanted = _jaxprs.wanted(jaxpr, tuple(results))
        line = _jaxprs.line(equation) or self.line
        return Evaluator(dict(totals), wanted, self.found, line)

    def chosen(self, variables: Sequence[Any]) -> tuple[bool, ...]:
        """Which of the variables are wanted."""
        return tuple(var in self.wanted for var in variables)


def arrays(values: Sequence[Any]) -> list[Any]:
    """The values, weights among them as what they have become."""
    return [value.array if isinstance(value, Weight) else value for value in values]


# --- programs in programs


def _jit(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    """As a jit again: it keeps its mesh and shardings, and what is called twice is traced once."""
    params, (jaxpr, consts) = equation.params, _jaxprs.inner(equation)
    if any(layout is not None for layout in _jaxprs.layouts(equation)):
        raise _views.Opaque("fixes layouts")
    results = ev.chosen(equation.outvars)
    key = (jaxpr, results, params.get("in_shardings"), params.get("out_shardings"))
    if key not in ev.found.calls:

        def body(totals: dict[int, jax.Array], values: list[Any]) -> Any:
            inner = ev.entered(equation, jaxpr, results, totals)
            divided = map(_divided, values, _jaxprs.shardings(equation, "in_shardings"))
            computed = inner.run(jaxpr, consts, *divided)
            divided = map(_divided, computed, _jaxprs.shardings(equation, "out_shardings"))
            return _own(list(divided), sources), inner.totals

        body.__name__ = str(params.get("name", "call"))
        ev.found.calls[key] = jax.jit(body)
    sources = _jaxprs.forwarded(jaxpr)
    with _meshes.entered(params.get("ctx_mesh")):
        computed, totals = ev.found.calls[key](ev.inside(values), values)
    ev.totals.update(totals)
    return _forwarded(computed, sources, values)


def _divided(value: Any, sharding: Any) -> Any:
    if sharding is None:
        return value
    if isinstance(value, Weight):
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
    sources, results = _jaxprs.forwarded(jaxpr), ev.chosen(equation.outvars)

    @functools.partial(jax.checkpoint, prevent_cse=params["prevent_cse"], policy=params["policy"])
    def body(totals: dict[int, jax.Array], values: list[Any]) -> Any:
        inner = ev.entered(equation, jaxpr, results, totals)
        return _own(inner.run(jaxpr, consts, *values), sources), inner.totals

    computed, totals = body(ev.inside(values), values)
    ev.totals.update(totals)
    return _forwarded(computed, sources, values)


def _scan(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    params = equation.params
    parts = _jaxprs.scan(equation, values)
    first, last = len(parts.consts), len(parts.consts) + len(parts.carry)
    sources = _jaxprs.forwarded(parts.body)
    wanted = _jaxprs.wanted_of_body(equation, ev.chosen(equation.outvars))
    where = ev.where(equation)

    def plain(values: list[Any], own: Evaluator, reason: str, variables: Sequence[Any]) -> Any:
        """Weights as arrays; without cotangents where nobody wants them."""
        pairs = zip(values, variables, strict=True)
        return [
            own.plain([v], reason)[0] if is_wanted else arrays([v])[0] for v, is_wanted in pairs
        ]

    # What the loop carries unchanged is a constant of it; what else it carries is computed.
    constant = [sources[i] == first + i for i in range(len(parts.carry))]
    start = [
        value if stays else plain([value], ev, f"{where}, which changes it", [own])[0]
        for value, stays, own in zip(parts.carry, constant, wanted, strict=False)
    ]
    stacks = [
        value
        if not isinstance(value, Weight) or _is_stack(value)
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

    def body(carry: Any, xs: Any) -> Any:
        moving, totals = carry
        index, slices = xs
        inner = ev.entered(equation, parts.body, wanted, totals)
        moving_values = iter(moving)
        carried = [
            value if stays else next(moving_values)
            for value, stays in zip(start, constant, strict=True)
        ]
        sliced = [
            stack.at(own[0], own[1], index) if isinstance(stack, Weight) else own
            for stack, own in zip(stacks, slices, strict=True)
        ]
        results = inner.run(parts.body, parts.body_consts, *parts.consts, *carried, *sliced)
        reason = f"{where}, which returns it"
        passed = [*constant, *(source is not None for source in through)]
        computed = [not stays for stays in passed]
        new = plain(
            list(itertools.compress(results, computed)),
            inner,
            reason,
            list(itertools.compress(wanted, computed)),
        )
        return (new[: len(moving)], inner.totals), new[len(moving) :]

    xs = [(own.array, own.root) if isinstance(own, Weight) else own for own in stacks]
    (moved, totals), collected = jax.lax.scan(
        body,
        (moving, ev.inside([*parts.consts, *start, *stacks])),
        (jnp.arange(params["length"], dtype=jnp.int32), xs),
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


def _is_stack(weight: Weight) -> bool:
    """Whether all of its pieces are stacks along the first axis; dense leaves may be any."""
    own = [piece.view for piece in weight.pieces]
    stacked = all((v.keys if v.leaf.rank else v.sketch).axes[0] is not None for v in own)
    return stacked and weight.is_whole(0)


def _cond(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    index, *operands = values
    results = ev.chosen(equation.outvars)

    def branch(program: Any) -> Callable[..., Any]:
        jaxpr, consts = _jaxprs.opened(program)

        def body(totals: dict[int, jax.Array], operands: list[Any]) -> Any:
            inner = ev.entered(equation, jaxpr, results, totals)
            values = inner.run(jaxpr, consts, *operands)
            return inner.plain(values, f"{ev.where(equation)}, which returns it"), inner.totals

        return body

    branches = [branch(jaxpr) for jaxpr in equation.params["branches"]]
    computed, totals = jax.lax.switch(index, branches, ev.inside(operands), operands)
    ev.totals.update(totals)
    return list(computed)


# --- uses


def _dot_general(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    left, right = arrays(values)
    for _own, other in ((left, right), (right, left)):
        if not jnp.issubdtype(other.dtype, jnp.floating):
            raise _views.Opaque(f"multiplies it with {other.dtype}")
    uses = []
    for is_right, value in enumerate(values):
        if isinstance(value, Weight):
            other = left if is_right else right
            numbers, precision = (equation.params[k] for k in ("dimension_numbers", "precision"))
            use = _uses.Product.dot(
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
    if not isinstance(weight, Weight):
        raise _views.Opaque("indexes by it")
    use = _uses.Lookup.gather(weight.array.shape, indices.ndim, equation.params)
    (output,) = _jaxprs.run(equation, arrays(values))
    return [ev.record(weight, use, output, indices[..., 0], ev.where(equation))]


def _convolution(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    other, weight = values
    if not isinstance(weight, Weight) or isinstance(other, Weight):
        raise _views.Opaque("is a convolution of it")
    use = _uses.Convolution.of_equation(weight.array.ndim, equation.params)
    (output,) = _jaxprs.run(equation, arrays(values))
    return [ev.record(weight, use, output, other, ev.where(equation))]


def _ragged(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    rows, weight, sizes = values
    if not isinstance(weight, Weight) or isinstance(rows, Weight):
        raise _views.Opaque("takes it for rows")
    use = _uses.Ragged.of_equation(equation.params)
    (output,) = _jaxprs.run(equation, arrays(values))
    return [ev.record(weight, use, output, (rows, sizes), ev.where(equation))]


def _reduce_sum(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    (weight,) = values
    axes, ndim = tuple(equation.params["axes"]), weight.array.ndim
    (output,) = _jaxprs.run(equation, [weight.array])
    if weight.root is None and all(
        piece.view.shape[axis] == 1 for piece in weight.pieces for axis in axes
    ):
        # Of weights side by side along an axis, that is the sum of them.
        rest = [axis for axis in range(ndim) if axis not in axes]
        views = [p.view.reshape([p.view.shape[i] for i in rest]) for p in weight.pieces]
        added = weight.replace(views, array=output, is_pure=weight.is_pure)
        return [_offsets(added, [[p.offset[i] for i in rest] for p in weight.pieces])]
    use = _uses.Product.sum(ndim, axes)
    return [ev.record(weight, use, output, None, ev.where(equation))]


# --- views


def _moved(
    weight: Weight,
    equation: _jaxprs.Equation,
    views: Sequence[_views.View] | None = None,
    operands: Sequence[Any] = (),
    **fields: Any,
) -> Weight:
    """A weight after an operation that moves its entries; `operands` are others of it."""
    views = [piece.view for piece in weight.pieces] if views is None else views
    (array,) = _jaxprs.run(equation, [weight.array, *operands])
    root = weight.root
    if root is not None:
        (root,) = _jaxprs.run(equation, [root, *operands])
    return weight.replace(views, array=array, root=root, **fields)


def _offsets(weight: Weight, offsets: Sequence[Sequence[int]]) -> Weight:
    pieces = (
        dataclasses.replace(piece, offset=tuple(offset))
        for piece, offset in zip(weight.pieces, offsets, strict=True)
    )
    return dataclasses.replace(weight, pieces=tuple(pieces))


def _unchanged(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    """Operations that change neither the axes nor, in effect, the values."""
    (var,) = equation.outvars
    if not jnp.issubdtype(_jaxprs.dtype(var), jnp.floating):
        raise _views.Opaque(f"casts it to {_jaxprs.dtype(var)}")
    weight, *operands = values
    return [_moved(weight, equation, None, operands)]


def _side_by_side(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    """Operations on several arrays that leave each as it is."""
    results = _jaxprs.run(equation, arrays(values))
    return [
        dataclasses.replace(value, array=result) if isinstance(value, Weight) else result
        for value, result in zip(values, results, strict=True)
    ]


def _transpose(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    (weight,) = values
    order = equation.params["permutation"]
    views = [piece.view.transpose(order) for piece in weight.pieces]
    offsets = [[piece.offset[axis] for axis in order] for piece in weight.pieces]
    return [_offsets(_moved(weight, equation, views), offsets)]


def _reshape(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    """`reshape`, `squeeze` and `expand_dims`: the new shape is that of the result."""
    weight, *sizes = values
    if sizes:
        raise _views.Opaque("has a shape that is not known when tracing")
    if equation.params.get("dimensions") and equation.primitive.name == "reshape":
        raise _views.Opaque("reorders axes")
    (var,) = equation.outvars
    old, new = weight.array.shape, _jaxprs.shape(var)
    # Of what does not fill it, axes that are neither merged nor split.
    groups = _views.axis_groups(old, new)
    partial = [axis for axis in range(len(old)) if not weight.is_whole(axis)]
    if any(len(a) + len(b) > 2 for a, b in groups if set(a) & set(partial)):
        raise _views.Opaque("merges or splits what was concatenated")
    to = {a[0]: b[0] for a, b in groups if set(a) & set(partial)}
    views, offsets = [], []
    for piece in weight.pieces:
        shape, offset = list(new), [0] * len(new)
        for axis, target in to.items():
            shape[target], offset[target] = piece.view.shape[axis], piece.offset[axis]
        views.append(piece.view.reshape(shape))
        offsets.append(offset)
    return [_offsets(_moved(weight, equation, views), offsets)]


def _broadcast(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    weight, *sizes = values
    if sizes:
        raise _views.Opaque("has a shape that is not known when tracing")
    spread = _spread(weight, equation.params["shape"], equation.params["broadcast_dimensions"])
    array, root = (
        None if own is None else _jaxprs.run(equation, [own])[0]
        for own in (weight.array, weight.root)
    )
    return [dataclasses.replace(spread, array=array, root=root)]


def _spread(weight: Weight, shape: Sequence[int], axes: Sequence[int]) -> Weight:
    """With the views of a weight that is broadcast to a shape, where it had these axes."""
    views, offsets = [], []
    for piece in weight.pieces:
        own, offset = list(shape), [0] * len(shape)
        for axis, to in enumerate(axes):
            if weight.array.shape[axis] == shape[to]:
                own[to], offset[to] = piece.view.shape[axis], piece.offset[axis]
        views.append(piece.view.broadcast(own, axes))
        offsets.append(offset)
    return _offsets(weight.replace(views), offsets)


def _broadcast_to(weight: Weight, shape: tuple[int, ...]) -> Weight:
    """Repeated along axes of size 1, as an operation with a larger array does."""
    if weight.array.shape == shape:
        return weight
    spread = _spread(weight, shape, range(len(shape)))
    array, root = (
        None if own is None else jnp.broadcast_to(own, shape) for own in (weight.array, weight.root)
    )
    return dataclasses.replace(spread, array=array, root=root)


def _reverse(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    (weight,) = values
    axes = equation.params["dimensions"]
    views = [piece.view.reverse(axes) for piece in weight.pieces]
    offsets = [
        [
            size - first - n if axis in axes else first
            for axis, (size, first, n) in enumerate(
                zip(weight.array.shape, piece.offset, piece.view.shape, strict=True)
            )
        ]
        for piece in weight.pieces
    ]
    return [_offsets(_moved(weight, equation, views), offsets)]


def _slice(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    (weight,) = values
    params = equation.params
    starts, limits = params["start_indices"], params["limit_indices"]
    if params["strides"] is not None and any(stride != 1 for stride in params["strides"]):
        raise _views.Opaque("skips entries")
    return [_block(weight, starts, limits, lambda array: _jaxprs.run(equation, [array])[0])]


def _split(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    (weight,) = values
    axis, shape = equation.params["axis"], weight.array.shape
    blocks, start = [], 0
    for number, size in enumerate(equation.params["sizes"]):
        starts = [start if i == axis else 0 for i in range(len(shape))]
        limits = [start + size if i == axis else n for i, n in enumerate(shape)]

        def take(array: jax.Array, number: int = number) -> jax.Array:
            return _jaxprs.run(equation, [array])[number]  # type: ignore[no-any-return]

        blocks.append(_block(weight, starts, limits, take))
        start += size
    return blocks


def _block(
    weight: Weight,
    starts: Sequence[int],
    limits: Sequence[int],
    take: Callable[[jax.Array], jax.Array],
) -> Any:
    """What of the pieces is in a block; an array where nothing is."""
    own = []
    for piece, source in zip(weight.pieces, weight.sources, strict=True):
        corners = list(zip(starts, limits, piece.offset, piece.view.shape, strict=True))
        first = [max(a, offset) for a, _, offset, _ in corners]
        last = [min(b, offset + n) for _, b, offset, n in corners]
        if all(a < b for a, b in zip(first, last, strict=True)):
            inside = [
                [x - o for x, o in zip(own, piece.offset, strict=True)] for own in (first, last)
            ]
            offset = tuple(a - start for a, start in zip(first, starts, strict=True))
            view = piece.view.slice(*inside)
            own.append((dataclasses.replace(piece, view=view, offset=offset), source))
    array = take(weight.array)
    if not own:
        return array
    pieces, sources = zip(*own, strict=True)
    root = None if weight.root is None else take(weight.root)
    return dataclasses.replace(weight, array=array, root=root, pieces=pieces, sources=sources)


def _dynamic_slice(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    """A block at a traced place."""
    weight, *starts = values
    if not isinstance(weight, Weight):
        raise _views.Opaque("slices by it")
    sizes, shape = equation.params["slice_sizes"], weight.array.shape
    cut = [axis for axis, size in enumerate(sizes) if size != shape[axis]]
    if not all(weight.is_whole(axis) for axis in cut):
        raise _views.Opaque("takes a part of what was concatenated")
    views, sources = [], []
    for piece, source in zip(weight.pieces, weight.sources, strict=True):
        view, positions = piece.view, source.positions
        for axis in cut:
            view = view.place(axis, sizes[axis], len(positions))
            # As JAX does, out of range is the nearest: keys must be those of what is read.
            start = jnp.clip(jnp.asarray(starts[axis], jnp.int32), 0, shape[axis] - sizes[axis])
            positions = (*positions, start)
        views.append(view)
        sources.append(source._replace(positions=positions))
    return [_moved(weight, equation, views, starts, sources=tuple(sources))]


def _concatenate(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    """Also of `stack`, which concatenates along a new axis."""
    (var,) = equation.outvars
    axis: int = equation.params["axis" if "axis" in equation.params else "dimension"]
    (array,) = _jaxprs.run(equation, arrays(values))
    weights = [value for value in values if isinstance(value, Weight)]
    root = None
    if any(weight.root is not None for weight in weights):
        roots = [
            value.root if isinstance(value, Weight) and value.root is not None else array
            for value, array in zip(values, arrays(values), strict=True)
        ]
        (root,) = _jaxprs.run(equation, roots)
    start, pieces = 0, []
    for value in values:
        is_new_axis = len(_jaxprs.shape(var)) > jnp.ndim(arrays([value])[0])
        for piece in value.pieces if isinstance(value, Weight) else ():
            view, offset = piece.view, list(piece.offset)
            if is_new_axis:
                view = view.reshape((*view.shape[:axis], 1, *view.shape[axis:]))
                offset.insert(axis, 0)
            offset[axis] += start
            baked = piece.baked if value.root is not None else len(view.scales)
            pieces.append(dataclasses.replace(piece, view=view, offset=tuple(offset), baked=baked))
        start += 1 if is_new_axis else arrays([value])[0].shape[axis]
    sources = sum((weight.sources for weight in weights), ())
    is_pure = len(weights) == len(values) and all(weight.is_pure for weight in weights)
    return [Weight(array, root, sources, tuple(pieces), is_pure)]


def _pad(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    weight, filling = values
    config = [tuple(map(int, own)) for own in equation.params["padding_config"]]
    if not isinstance(weight, Weight) or any(inner for _, _, inner in config):
        raise _views.Opaque("spreads it")
    shape = weight.array.shape
    starts = [max(0, -low) for low, _, _ in config]
    limits = [n - max(0, -high) for n, (_, high, _) in zip(shape, config, strict=True)]
    block = _block(weight, starts, limits, lambda array: array)
    if not isinstance(block, Weight):
        return _jaxprs.run(equation, arrays(values))
    offsets = [
        [o + max(0, low) for o, (low, _, _) in zip(piece.offset, config, strict=True)]
        for piece in block.pieces
    ]
    padded = _moved(
        dataclasses.replace(block, array=weight.array, root=weight.root),
        equation,
        operands=[filling],
        is_pure=False,
    )
    return [_offsets(padded, offsets)]


# --- factors and sums


def _scale(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    """Of `mul`, `div` and `neg`: times a factor along some axes."""
    name, (var,) = equation.primitive.name, equation.outvars
    weight, factor = (*values, -1.0)[:2] if name != "mul" else values
    if name == "mul" and values[0] is values[1]:
        return _square(ev, equation, values[:1])
    if name == "mul" and not isinstance(weight, Weight):
        weight, factor = factor, weight
    if not isinstance(weight, Weight) or isinstance(factor, Weight) or not weight.is_pure:
        raise _views.Opaque("is no factor of it alone")
    scale = jnp.asarray(factor, _uses.wide(_jaxprs.dtype(var)))
    scale = 1 / scale if name == "div" else scale
    (array,) = _jaxprs.run(equation, arrays(values))
    shape = _jaxprs.shape(var)
    weight = _broadcast_to(weight, shape)
    # A number that the program has as such has no gradient, and nothing is kept for it.
    is_number = any(isinstance(var, _jaxprs.Literal) for var in equation.invars) or name == "neg"
    old_root = root = weight.root
    if root is None and not is_number:
        root = weight.array
    # The factor has its gradient from the uses.
    weight = _times(dataclasses.replace(weight, array=jax.lax.stop_gradient(array)), scale)
    baked = [len(p.view.scales) - 1 if old_root is None else p.baked for p in weight.pieces]
    pieces = (
        dataclasses.replace(piece, baked=own)
        for piece, own in zip(weight.pieces, baked, strict=True)
    )
    return [dataclasses.replace(weight, root=root, pieces=tuple(pieces))]


def _times(weight: Weight, scale: jax.Array) -> Weight:
    """With a factor, which the array has already, in its views."""
    shape = jnp.shape(scale) or (1,) * weight.array.ndim
    views, sources = [], []
    for piece, source in zip(weight.pieces, weight.sources, strict=True):
        own = scale.reshape(shape)
        for axis, (first, n) in enumerate(zip(piece.offset, piece.view.shape, strict=True)):
            if own.shape[axis] not in (1, n):
                own = jax.lax.slice_in_dim(own, first, first + n, axis=axis)
        views.append(piece.view.scaled(own.shape))
        own = own.reshape(views[-1].scales[-1].shape)
        sources.append(source._replace(scales=(*source.scales, own)))
    return weight.replace(views, sources=tuple(sources))


def _square(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    (weight,) = values
    if equation.params.get("y", 2) != 2 or not weight.is_pure:
        raise _views.Opaque("is no square of it alone")
    if any(piece.view.scales or piece.view.is_square for piece in weight.pieces):
        raise _views.Opaque("is of its product with a factor")
    views = [dataclasses.replace(piece.view, is_square=True) for piece in weight.pieces]
    arguments = [weight.array] * len(equation.invars)
    (array,) = _jaxprs.run(equation, arguments)
    return [weight.replace(views, array=array, root=weight.array)]


def _add(ev: Evaluator, equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    """Of `add`, `sub` and `add_any`: a sum with something, of which the weight is a part."""
    (var,) = equation.outvars
    (array,) = _jaxprs.run(equation, arrays(values))
    weights = [value for value in values if isinstance(value, Weight)]
    roots = [weight.root for weight in weights if weight.root is not None]
    weights = [_broadcast_to(weight, _jaxprs.shape(var)) for weight in weights]
    if equation.primitive.name == "sub" and isinstance(values[1], Weight):
        weights[-1] = _times(weights[-1], jnp.float32(-1))
    if roots and len(weights) > 1:
        raise _views.Opaque("is a sum of products of it")
    sources = sum((weight.sources for weight in weights), ())
    pieces = sum((weight.pieces for weight in weights), ())
    is_pure = len(weights) == len(values) and all(weight.is_pure for weight in weights)
    return [Weight(array, roots[0] if roots else None, sources, pieces, is_pure)]


_Rule: TypeAlias = Callable[[Evaluator, _jaxprs.Equation, list[Any]], list[Any]]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_jaxprs.JIT, _jit),
    **dict.fromkeys(_jaxprs.CHECKPOINT, _checkpoint),
    "scan": _scan,
    "cond": _cond,
    "dot_general": _dot_general,
    "gather": _gather,
    "conv_general_dilated": _convolution,
    "ragged_dot_general": _ragged,
    "reduce_sum": _reduce_sum,
    **dict.fromkeys(("convert_element_type", "copy", "name", "pvary", "pcast"), _unchanged),
    **dict.fromkeys(("sharding_constraint", "reshard"), _unchanged),
    **dict.fromkeys(("device_put", "optimization_barrier"), _side_by_side),
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "rev": _reverse,
    "slice": _slice,
    "split": _split,
    "dynamic_slice": _dynamic_slice,
    **dict.fromkeys(("concatenate", "stack"), _concatenate),
    "pad": _pad,
    **dict.fromkeys(("mul", "div", "neg"), _scale),
    **dict.fromkeys(("square", "integer_pow"), _square),
    **dict.fromkeys(("add", "sub", "add_any"), _add),
}
