"""Weights as values of a traced program, and the operations that make other views of them.

The rules here take an equation and its operands, weights among them, and give its results: the
entries moved, or multiplied by factors. They know nothing of gradients but what the views note.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from florax import _jaxprs, _pieces, _slots, _terms, _uses, _views


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
    pieces: tuple[_pieces.Piece, ...] = dataclasses.field(metadata={"static": True})
    is_pure: bool = dataclasses.field(default=True, metadata={"static": True})

    @classmethod
    def of(cls, array: jax.Array, parts: Sequence[tuple[int, Any, jax.Array]]) -> "Weight":
        """A weight itself; for each of its sketches a number, a leaf and the keys of matrices."""
        start = (0,) * array.ndim
        pieces = [_pieces.Piece(i, _views.View.of(leaf), start) for i, leaf, _ in parts]
        return cls(array, None, tuple(_uses.Source(keys) for *_, keys in parts), tuple(pieces))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value."""
        return tuple(self.array.shape)

    def replace(self, pieces: Sequence[_pieces.Piece], **fields: Any) -> "Weight":
        """With its pieces seen otherwise."""
        return dataclasses.replace(self, pieces=tuple(pieces), **fields)

    def is_whole(self, axis: int) -> bool:
        """Whether all of its pieces go from end to end of an axis."""
        return {piece.view.shape[axis] for piece in self.pieces} == {self.shape[axis]}

    def is_stack(self) -> bool:
        """Whether all of its pieces are stacks along the first axis; dense leaves may be any."""
        views = [piece.view for piece in self.pieces]
        stacked = all((v.keys if v.leaf.rank else v.sketch).axes[0] is not None for v in views)
        return stacked and self.is_whole(0)

    def layer_keys(self) -> list[jax.Array]:
        """Per piece that is compressed its keys, a row for every position along the first axis."""
        pairs = zip(self.pieces, self.sources, strict=True)
        return [p.view.layer_keys(s.keys, s.positions) for p, s in pairs if p.view.leaf.rank]

    def at(
        self,
        index: jax.Array,
        array: jax.Array,
        root: jax.Array | None,
        keys: jax.Array | None,
        words: Iterator[tuple[int, int]],
    ) -> "Weight":
        """One position along the first axis, with its values, and of `layer_keys` a row each.

        They are among `keys`, at those words.
        """
        pieces, sources = [], []
        for piece, source in zip(self.pieces, self.sources, strict=True):
            if piece.view.leaf.rank:
                assert keys is not None
                piece = piece.moved(piece.view.with_layer_keys(next(words)), piece.offset)
                source = source._replace(keys=keys)
            pieces.append(piece.place(0, 1, len(source.positions)).squeeze([0]))
            sources.append(source._replace(positions=(*source.positions, index)))
        return self.replace(pieces, array=array, root=root, sources=tuple(sources))

    def can_be_written(self, slots: Mapping[int, _slots.Slot], counts: Mapping[int, int]) -> bool:
        """Whether every position along the first axis can be, by itself and once.

        `counts` says how many pieces of each weight there are.
        """
        if not self.shape[0]:
            return False
        firsts = [piece.place(0, 1, 0).view for piece in self.pieces]
        return all(
            piece.number not in slots
            or (counts[piece.number] == 1 and slots[piece.number].can_write(first))
            for piece, first in zip(self.pieces, firsts, strict=True)
        )

    def written(self, slots: Mapping[int, _slots.Slot], totals: dict[int, jax.Array]) -> "Weight":
        """With totals, which are put among the others, that are written into slots."""
        pieces = []
        for piece, source in zip(self.pieces, self.sources, strict=True):
            if piece.number in slots:
                view, total = slots[piece.number].total(piece.view, source.positions)
                totals[piece.number] = total
                piece = piece.moved(view, piece.offset)
            pieces.append(piece)
        return self.replace(pieces)

    def times(self, scale: jax.Array) -> "Weight":
        """With a factor, which the array has already, noted of its pieces."""
        scale = scale.reshape(jnp.shape(scale) or (1,) * self.array.ndim)
        pieces, parts = zip(*(piece.times(scale) for piece in self.pieces), strict=True)
        pairs = zip(self.sources, parts, strict=True)
        sources = tuple(own._replace(scales=(*own.scales, part)) for own, part in pairs)
        return self.replace(pieces, sources=sources)

    def broadcast(self, shape: tuple[int, ...]) -> "Weight":
        """Repeated along axes of size 1, as an operation with a larger array does."""
        if self.shape == shape:
            return self
        if len(self.shape) != len(shape):
            raise _views.Opaque("takes a single entry")
        pieces = [p.broadcast(self.shape, shape, range(len(shape))) for p in self.pieces]
        array = jnp.broadcast_to(self.array, shape)
        root = None if self.root is None else jnp.broadcast_to(self.root, shape)
        return self.replace(pieces, array=array, root=root)


def arrays(values: Sequence[Any]) -> list[Any]:
    """The values, weights among them as what they have become."""
    return [value.array if isinstance(value, Weight) else value for value in values]


def _moved(
    weight: Weight,
    equation: _jaxprs.Equation,
    pieces: Sequence[_pieces.Piece],
    operands: Sequence[Any] = (),
    **fields: Any,
) -> Weight:
    """A weight after an operation that moves its entries; `operands` are others of it."""
    (array,) = _jaxprs.run(equation, [weight.array, *operands])
    root = weight.root
    if root is not None:
        (root,) = _jaxprs.run(equation, [root, *operands])
    return weight.replace(pieces, array=array, root=root, **fields)


# --- another order, shape or part


def _unchanged(equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    """Operations that change neither the axes nor, in effect, the values."""
    (var,) = equation.outvars
    if not jnp.issubdtype(_jaxprs.dtype(var), jnp.floating):
        raise _views.Opaque(f"casts it to {_jaxprs.dtype(var)}")
    weight, *operands = values
    return [_moved(weight, equation, weight.pieces, operands)]


def _side_by_side(equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    """Operations on several arrays that leave each as it is."""
    results = _jaxprs.run(equation, arrays(values))
    return [
        dataclasses.replace(value, array=result) if isinstance(value, Weight) else result
        for value, result in zip(values, results, strict=True)
    ]


def _transpose(equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    (weight,) = values
    order = equation.params["permutation"]
    return [_moved(weight, equation, [piece.transpose(order) for piece in weight.pieces])]


def _reshape(equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    """`reshape`, `squeeze` and `expand_dims`: the new shape is that of the result."""
    weight, *sizes = values
    if sizes:
        raise _views.Opaque("has a shape that is not known when tracing")
    if equation.params.get("dimensions") and equation.primitive.name == "reshape":
        raise _views.Opaque("reorders axes")
    (var,) = equation.outvars
    pieces = [piece.reshape(weight.shape, _jaxprs.shape(var)) for piece in weight.pieces]
    return [_moved(weight, equation, pieces)]


def _broadcast(equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    weight, *sizes = values
    if sizes:
        raise _views.Opaque("has a shape that is not known when tracing")
    shape, axes = (equation.params[name] for name in ("shape", "broadcast_dimensions"))
    pieces = [piece.broadcast(weight.shape, shape, axes) for piece in weight.pieces]
    return [_moved(weight, equation, pieces)]


def _reverse(equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    (weight,) = values
    axes = equation.params["dimensions"]
    return [_moved(weight, equation, [p.reverse(axes, weight.shape) for p in weight.pieces])]


def _slice(equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    (weight,) = values
    params = equation.params
    if params["strides"] is not None and any(stride != 1 for stride in params["strides"]):
        raise _views.Opaque("skips entries")
    starts, limits = params["start_indices"], params["limit_indices"]
    return [_block(weight, starts, limits, lambda array: _jaxprs.run(equation, [array])[0])]


def _split(equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    (weight,) = values
    axis = equation.params["axis"]
    blocks, start = [], 0
    for number, size in enumerate(equation.params["sizes"]):
        starts, limits = [0] * len(weight.shape), list(weight.shape)
        starts[axis], limits[axis] = start, start + size

        def take(array: jax.Array, number: int = number) -> Any:
            return _jaxprs.run(equation, [array])[number]

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
    cut = [piece.block(starts, limits) for piece in weight.pieces]
    pieces = [piece for piece in cut if piece is not None]
    sources = (s for s, piece in zip(weight.sources, cut, strict=True) if piece is not None)
    array = take(weight.array)
    if not pieces:
        return array
    root = None if weight.root is None else take(weight.root)
    return weight.replace(pieces, array=array, root=root, sources=tuple(sources))


def _dynamic_slice(equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    """A block at a traced place."""
    weight, *starts = values
    if not isinstance(weight, Weight):
        raise _views.Opaque("slices by it")
    sizes, shape = equation.params["slice_sizes"], weight.shape
    cut = [axis for axis, size in enumerate(sizes) if size != shape[axis]]
    if not all(weight.is_whole(axis) for axis in cut):
        raise _views.Opaque("takes a part of what was concatenated")
    pieces, sources = list(weight.pieces), list(weight.sources)
    for axis in cut:
        # As JAX does, out of range is the nearest: keys must be those of what is read.
        start = jnp.clip(jnp.asarray(starts[axis], jnp.int32), 0, shape[axis] - sizes[axis])
        for i, source in enumerate(sources):
            pieces[i] = pieces[i].place(axis, sizes[axis], len(source.positions))
            sources[i] = source._replace(positions=(*source.positions, start))
    return [_moved(weight, equation, pieces, starts, sources=tuple(sources))]


# --- several arrays in one


def _concatenate(equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    """Also of `stack`, which concatenates along a new axis."""
    axis: int = equation.params["axis" if "axis" in equation.params else "dimension"]
    start, offset, placed = 0, [0] * len(_jaxprs.shape(equation.outvars[0])), []
    for value in values:
        offset[axis] = start
        is_new_axis = jnp.ndim(arrays([value])[0]) < len(offset)
        start += 1 if is_new_axis else arrays([value])[0].shape[axis]
        if isinstance(value, Weight):
            pieces = [piece.insert(axis) if is_new_axis else piece for piece in value.pieces]
            value = value.replace([piece.shift(offset) for piece in pieces])
        placed.append(value)
    return [_together(equation, placed)]


def _pad(equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    weight, filling = values
    config = [tuple(map(int, own)) for own in equation.params["padding_config"]]
    if not isinstance(weight, Weight) or any(inner for _, _, inner in config):
        raise _views.Opaque("spreads it")
    starts = [max(0, -low) for low, _, _ in config]
    limits = [n - max(0, -high) for n, (_, high, _) in zip(weight.shape, config, strict=True)]
    block = _block(weight, starts, limits, lambda array: array)
    if not isinstance(block, Weight):
        return _jaxprs.run(equation, arrays(values))
    pieces = [piece.shift([max(0, low) for low, _, _ in config]) for piece in block.pieces]
    return [_moved(block, equation, pieces, [filling], is_pure=False)]


def _add(equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    """Of `add`, `sub` and `add_any`: a sum, of which the weight is a part."""
    (var,) = equation.outvars
    left, right = (
        value.broadcast(_jaxprs.shape(var)) if isinstance(value, Weight) else value
        for value in values
    )
    if equation.primitive.name == "sub" and isinstance(right, Weight):
        right = right.times(jnp.float32(-1))
    if any(isinstance(value, Weight) and value.root is not None for value in (left, right)) and (
        isinstance(left, Weight) and isinstance(right, Weight)
    ):
        raise _views.Opaque("is a sum of products of it")
    return [_together(equation, [left, right], values)]


def _together(
    equation: _jaxprs.Equation, placed: Sequence[Any], operands: Sequence[Any] = ()
) -> Weight:
    """What an operation makes of several arrays, with the pieces of all that are weights."""
    (array,) = _jaxprs.run(equation, arrays(operands or placed))
    weights = [value for value in placed if isinstance(value, Weight)]
    roots = [weight.root for weight in weights]
    root, pieces = None, [piece for weight in weights for piece in weight.pieces]
    if len(roots) == 1:
        root = roots[0]
    if any(own is not None for own in roots) and equation.primitive.name not in _SUMS:
        # Of those without a root it is the value, in which all factors are.
        (root,) = _jaxprs.run(
            equation,
            [
                value.root if isinstance(value, Weight) and value.root is not None else own
                for value, own in zip(placed, arrays(placed), strict=True)
            ],
        )
        pieces = [
            dataclasses.replace(p, baked=len(p.view.scales) if weight.root is None else p.baked)
            for weight in weights
            for p in weight.pieces
        ]
    sources = sum((weight.sources for weight in weights), ())
    is_pure = len(weights) == len(placed) and all(weight.is_pure for weight in weights)
    return Weight(array, root, sources, tuple(pieces), is_pure)


_SUMS = ("add", "sub", "add_any")

# --- factors


def _scale(equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    """Of `mul`, `div` and `neg`: times a factor along some axes."""
    name, (var,) = equation.primitive.name, equation.outvars
    weight, factor = values if len(values) == 2 else (values[0], -1.0)
    if weight is factor and name == "mul":
        return _square(equation, [weight])
    if name == "mul" and not isinstance(weight, Weight):
        weight, factor = factor, weight
    if not isinstance(weight, Weight) or isinstance(factor, Weight) or not weight.is_pure:
        raise _views.Opaque("is of more than a factor and it")
    scale = jnp.asarray(factor, _terms.wide(_jaxprs.dtype(var)))
    scale = 1 / scale if name == "div" else scale
    (array,) = _jaxprs.run(equation, arrays(values))
    weight = weight.broadcast(_jaxprs.shape(var))
    # A number that the program has as such has no gradient, and nothing is kept for it.
    is_number = any(isinstance(var, _jaxprs.Literal) for var in equation.invars) or name == "neg"
    scaled = weight.times(scale)
    if weight.root is None and not is_number:
        baked = [dataclasses.replace(p, baked=len(p.view.scales) - 1) for p in scaled.pieces]
        scaled = scaled.replace(baked, root=weight.array)
    # The factor has its gradient from the uses.
    return [dataclasses.replace(scaled, array=jax.lax.stop_gradient(array))]


def _square(equation: _jaxprs.Equation, values: list[Any]) -> list[Any]:
    (weight,) = values
    if equation.params.get("y", 2) != 2 or not weight.is_pure:
        raise _views.Opaque("is no square of it alone")
    if any(piece.view.scales or piece.view.is_square for piece in weight.pieces):
        raise _views.Opaque("is of its product with a factor")
    pieces = [p.moved(dataclasses.replace(p.view, is_square=True), p.offset) for p in weight.pieces]
    (array,) = _jaxprs.run(equation, [weight.array] * len(equation.invars))
    return [weight.replace(pieces, array=array, root=weight.array)]


RULES: dict[str, Callable[[_jaxprs.Equation, list[Any]], list[Any]]] = {
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
    **dict.fromkeys(_SUMS, _add),
    **dict.fromkeys(("mul", "div", "neg"), _scale),
    **dict.fromkeys(("square", "integer_pow"), _square),
}
