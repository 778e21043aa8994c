"""A FLORA state: the sketches of all leaves, and with them all that reading them needs."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from florax import _boxes, _dimensions, _keys, _leaves, _meshes, _stored

T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sketch:
    """The gradient of one leaf, born compressed by `value_and_grad`.

    It stands where the gradient of the leaf would stand. Sketches of the same cycle may be added
    and averaged, over micro-batches or devices; `flora_accumulate`, and a `flora_momentum` without
    its residual that stands first, take them, and nothing else does: used as an array it raises. A
    sketch of another cycle or another state is refused, or, where values are traced, becomes NaN.

    Attributes:
      array: the sketch, shape `(*batch, *rows, rank)`, float32 or the parameter's dtype if wider;
        where both sides are projected, a tuple of two.
      stamp: of which projections it is, shape `(5,)`, float32; added and scaled as `array` is.
      leaf: the leaf that it belongs to; static.

    Raises:
      TypeError: it is used as an array.

    >>> import florax, jax, jax.numpy as jnp, optax
    >>> tx = florax.flora_accumulate(optax.sgd(0.1), every_k_schedule=2, rank=2)
    >>> params = jnp.ones((8, 4))
    >>> gradient = florax.value_and_grad(lambda w, x: jnp.mean(x @ w), tx)
    >>> state = tx.init(params)
    >>> sketches = [gradient(params, x, opt_state=state)[1] for x in jnp.ones((2, 16, 8))]
    >>> jax.tree.map(jnp.add, *sketches).array.shape
    (8, 2)
    """

    array: jax.Array
    stamp: jax.Array
    leaf: _leaves.Leaf = dataclasses.field(metadata={"static": True})

    def __jax_array__(self) -> NoReturn:
        """Raise: a sketch is not a gradient."""
        raise TypeError(
            f"The gradient of {self.leaf.path} is a florax.Sketch, not an array: only "
            "flora_accumulate, florax.accumulate and a flora_momentum(..., residual=False) that "
            "stands first take it. For full gradients use jax.value_and_grad."
        )

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise: a sketch is not a gradient."""
        self.__jax_array__()


# Sums of squares of gradients must not notice it, and float32 must hold it.
_WEIGHT = 2.0**-60


def _digits(keys: jax.Array) -> jax.Array:
    """Keys as four numbers in [1, 2) each, shape `(n, 4)`, float32."""
    halves = jnp.concatenate([keys >> 16, keys & 0xFFFF], axis=1)
    return 1 + halves.astype(jnp.float32) * 2.0**-16


def agrees(condition: jax.Array | bool) -> bool | None:
    """Its value, or None where that is not known when tracing."""
    return None if isinstance(condition, jax.core.Tracer) else bool(condition)


def where_true(condition: jax.Array | bool, array: jax.Array) -> jax.Array:
    """The array, or NaN throughout unless the condition holds."""
    if agrees(condition):
        return array
    return jnp.where(condition, array, jnp.full_like(array, jnp.nan))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sketches:
    """What a state keeps for the leaves, and all that is needed to read it.

    Attributes:
      arrays: a tree like the parameters; per leaf the sketch, shape `(*batch, *rows, rank)`, where
        both sides are projected a tuple of two, or, for a leaf that is kept dense, an array of its
        own shape; in few bits, a `Quantized` one.
      words: by its name, per leaf that is compressed or in few bits the words that its projections
        and roundings are drawn from, shape `(2,)`, uint32. Saved with the sketch, they are right
        whatever the leaf is called later.
      key: base key of the projections, raw threefry data, shape `(2,)`, uint32.
      cycle: which projections the sketches are read with, shape `()`, int32.
      digest: of the plan and the settings, shape `(2,)`, uint32: tells a state that was saved under
        others.
      plan: one `Leaf` per leaf, in flattening order; static.
      settings: the name of the transformation, and what of its settings decides how the sketches
        are read and added to; static.
    """

    arrays: Any
    words: Mapping[str, jax.Array]
    key: jax.Array
    cycle: jax.Array
    digest: jax.Array
    plan: tuple[_leaves.Leaf, ...] = dataclasses.field(metadata={"static": True})
    settings: tuple[Any, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def zeros(
        cls,
        params: Any,
        plan: tuple[_leaves.Leaf, ...],
        dtype: Callable[[jnp.dtype], jax.typing.DTypeLike],
        key: Any,
        settings: tuple[Any, ...],
    ) -> "Sketches":
        """Of zero, for planned `params`; `dtype` gives the state's dtype for a parameter's."""
        register_with_flax(cls, ("arrays", "words", "key", "cycle", "digest"))
        register_with_flax(_stored.Quantized, ("words", "scales"))
        flat = jax.tree.leaves(params)
        with sending():
            each = [
                [part.zeros(x, dtype(leaf.dtype)) for part in leaf.parts]
                for leaf, x in zip(plan, flat, strict=True)
            ]
            parts, zeros = parts_of(plan), [own for several in each for own in several]
            words = {
                part.path: jnp.array(_keys.words(part.path))
                for part, own in zip(parts, zeros, strict=True)
                if part.rank or _stored.is_quantized(own)
            }
            digest, cycle = jnp.array(_digest(parts, settings, zeros)), jnp.zeros([], jnp.int32)
            base = _keys.base_key(key)
        axes = [
            [_stored.named(x, part.kept_axes) for x, part in zip(own, leaf.parts, strict=True)]
            for own, leaf in zip(each, plan, strict=True)
        ]
        arrays = _boxes.fill(params, each, axes)
        return cls(arrays, words, base, cycle, digest, plan, settings)

    @property
    def parts(self) -> list[_leaves.Leaf]:
        """A leaf for everything that is stored: two where a leaf of the plan has two sketches."""
        return parts_of(self.plan)

    def leaves(self) -> list[_stored.Stored]:
        """What is stored, in the order of `parts`."""
        return jax.tree.leaves(self.arrays, is_leaf=_stored.is_quantized)

    def read(self) -> list[jax.Array]:
        """The arrays in the order of `parts`."""
        return [_stored.read(own) for own in self.leaves()]

    def replace(self, leaves: Sequence[_stored.Stored], **fields: Any) -> "Sketches":
        """The same with others stored, given in the order of `parts`."""
        treedef = jax.tree.structure(self.arrays, is_leaf=_stored.is_quantized)
        return dataclasses.replace(self, arrays=jax.tree.unflatten(treedef, leaves), **fields)

    def zeroed(self, **fields: Any) -> "Sketches":
        """The same with zeros stored."""
        return dataclasses.replace(self, arrays=jax.tree.map(jnp.zeros_like, self.arrays), **fields)

    def checked(self, settings: tuple[Any, ...]) -> tuple["Sketches", jax.Array]:
        """The same, refused if it was made under other settings; and whether it was not.

        Where values are traced and it was, the sketches become NaN, and what is in integers. Leaves
        that are kept dense in floats do not, for they must stay what they are with Optax, to the
        bit.
        """
        found, leaves = None, self.leaves()
        if self.settings != settings:
            found = f"{self.settings}, got {settings}"
        for leaf, array in zip(self.parts, leaves, strict=True):
            if tuple(array.shape) != leaf.stored_shape:
                found = f"{leaf}, got an array of shape {tuple(array.shape)}"
            elif not _stored.fits(array):
                found = f"{leaf.path} in {array.dtype}, got an array in other numbers"
        same = jnp.all(self.digest == _digest(self.parts, self.settings, leaves))
        if not found and agrees(same) is False:
            found = (
                f"others than {self.settings}, other ranks or bits, by the digest that was saved"
            )
        if found:
            raise ValueError(
                f"The state was made under other settings than those of the transformation: {found}"
                ". Pass the settings that the state was made with, or call init again."
            )
        nan = functools.partial(where_true, same)
        arrays = [
            _stored.scaled(nan, own) if leaf.rank or _stored.is_quantized(own) else own
            for leaf, own in zip(self.parts, leaves, strict=True)
        ]
        return self.replace(arrays), same

    def keys(self) -> dict[str, jax.Array]:
        """By its name, per compressed part the keys of its matrices, or seeds: see `_keys`."""
        chosen = [leaf for leaf in self.parts if leaf.rank]
        words = [self.words[leaf.path] for leaf in chosen]
        own = _keys.of_matrices(chosen, words, self.key, self.cycle)
        own = _keys.seeds(chosen, own)
        return {leaf.path: key for leaf, key in zip(chosen, own, strict=True)}

    def keys_of(self, leaves: Sequence[_leaves.Leaf]) -> jax.Array:
        """The keys of compressed leaves in the cycle, without an index in a stack, `(n, 2)`."""
        key = _keys.fold(self.key, self.cycle)
        return _keys.fold_words(key, jnp.stack([self.words[leaf.path] for leaf in leaves]))

    def stamped(self, arrays: Sequence[Any], leaves: Sequence[_leaves.Leaf]) -> list[Sketch]:
        """Sketches of compressed leaves that were made with the projections of the cycle.

        Of leaves with two, a pair of arrays.
        """
        if not leaves:
            return []
        digits = _digits(self.keys_of(leaves))
        stamps = _WEIGHT * jnp.concatenate([digits, jnp.ones_like(digits[:, :1])], axis=1)
        triples = zip(arrays, _keys.rows(stamps), leaves, strict=True)
        return [
            Sketch(x, _meshes.varying_as(stamp, jax.tree.leaves(x)[0]), leaf)
            for x, stamp, leaf in triples
        ]

    def admit(self, sketches: Sequence[Sketch]) -> list[list[jax.Array]]:
        """The arrays of each, if they were made with the projections of the cycle; else NaN."""
        # All together, but for those whose stamps have other axes of a `shard_map` in their type.
        groups: dict[Any, list[int]] = {}
        for i, sketch in enumerate(sketches):
            groups.setdefault(_meshes.varying(sketch.stamp), []).append(i)
        arrays = {}
        for members in groups.values():
            own = [sketches[i] for i in members]
            are_right = _keys.rows(self._are_right(own))
            for i, sketch, is_right in zip(members, own, are_right, strict=True):
                # What is not finite comes from a factor that is not, and the array has it too.
                if agrees(is_right) is False and agrees(jnp.isfinite(sketch.stamp[4])):
                    raise ValueError(
                        f"The sketch of {sketch.leaf.path} was made for another state: of another "
                        "cycle or key. Give value_and_grad the very state as opt_state that is "
                        "updated with it."
                    )
                arrays[i] = [where_true(is_right, x) for x in jax.tree.leaves(sketch.array)]
        return [arrays[i] for i in range(len(sketches))]

    def _are_right(self, sketches: Sequence[Sketch]) -> jax.Array:
        """Which of them have the stamps of the cycle."""
        stamps = jnp.stack([sketch.stamp for sketch in sketches])
        weights = stamps[:, 4:]
        errors = stamps[:, :4] - weights * _digits(self.keys_of([own.leaf for own in sketches]))
        # A digit is a multiple of 2⁻¹⁶; sums and means of stamps are off by some roundings.
        eps = [float(jnp.finfo(sketch.stamp.dtype).eps) for sketch in sketches]  # type: ignore[no-untyped-call]
        tolerances = np.array([[max(2.0**-12, 8 * own)] for own in eps], np.float32)
        close = jnp.abs(errors) <= tolerances * jnp.abs(weights)
        return jnp.all(close, axis=1)

    def draw(self, leaves: Sequence[_leaves.Leaf] | None = None) -> dict[str, jax.Array]:
        """By its name, per compressed leaf its projections, `(*batch, rank, *columns)`, float32."""
        chosen = [leaf for leaf in (self.parts if leaves is None else leaves) if leaf.rank]
        if not chosen:
            return {}
        words = [self.words[leaf.path] for leaf in chosen]
        keys = _keys.of_all_matrices(chosen, words, self.key, self.cycle)
        drawn = _keys.draw_all(chosen, keys)
        return {leaf.path: a for leaf, a in zip(chosen, drawn, strict=True)}

    def compress(self, grads: Sequence[Any]) -> list[jax.Array]:
        """Per part the sketch of its leaf's gradient, which may be one; dense ones as they are."""
        pairs = list(zip(self.plan, grads, strict=True))
        drawn = self.draw(parts_of([leaf for leaf, grad in pairs if not isinstance(grad, Sketch)]))
        born = iter(self.admit([grad for _, grad in pairs if isinstance(grad, Sketch)]))
        sketches = []
        for leaf, grad in pairs:
            if isinstance(grad, Sketch):
                sketches += next(born)
                continue
            for part in leaf.parts:
                a = drawn.get(part.path)
                sketches.append(grad if a is None else part.compress(grad, a))
        return sketches

    def match(self, updates: Any, what: str = "gradient") -> tuple[list[Any], Any]:
        """Flatten `updates` after checking that it is a tree of gradients for the leaves.

        A gradient is an array of its leaf's shape or, where the leaf is compressed, its `Sketch`.
        """
        flat, treedef = jax.tree.flatten(updates, is_leaf=is_sketch)
        self.aligned(f"The {what}s", updates, surplus=False)
        for grad, leaf in zip(flat, self.plan, strict=True):
            if isinstance(grad, Sketch):
                if grad.leaf != leaf:
                    raise ValueError(
                        f"The sketch of {leaf.path} was made for another state, as {grad.leaf}, "
                        f"where this one has {leaf}. Pass this state to value_and_grad as "
                        "opt_state."
                    )
                continue
            shape, dtype = _leaves.shape_and_dtype(leaf.path, grad)
            if shape != leaf.shape:
                raise ValueError(
                    f"The {what} of {leaf.path} has shape {shape}, the parameter given to init had "
                    f"{leaf.shape}. Pass {what}s like those given to init, or call init again."
                )
            _leaves.check_dtype(leaf.path, dtype)
        return [grad if is_sketch(grad) else jnp.asarray(grad) for grad in flat], treedef

    def aligned(self, what: str, tree: Any, surplus: bool = True) -> list[Any]:
        """Per leaf its node of a tree, by name; a whole module, say, has a surplus of them."""
        flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_sketch)
        named = {_dimensions.name(path): node for path, node in flat}
        planned = [leaf.path for leaf in self.plan]
        missing = [path for path in planned if path not in named]
        more = [path for path in named if path not in planned]
        if missing or (more and not surplus):
            raise ValueError(
                f"{what} do not match the parameters that the state was made for: missing "
                f"{missing}, surplus {more}. Pass a tree like the parameters given to init, or "
                "call init again."
            )
        return [named[path] for path in planned]

    def round(
        self, values: Sequence[jax.Array], *counts: jax.typing.ArrayLike
    ) -> list[_stored.Stored]:
        """Round what the leaves keep to the state's numbers; `counts` say which rounding it is.

        Sketches and integers are rounded stochastically, so that they are right on average; leaves
        that are kept dense in floats are cast, as Optax does.
        """
        triples = [*zip(self.parts, values, self.leaves(), strict=True)]
        keys = self.rounding_keys(
            [
                leaf.path
                for leaf, value, old in triples
                if _stored.is_quantized(old)
                or (leaf.rank and jnp.promote_types(value.dtype, old.dtype) != old.dtype)
            ],
            *counts,
        )
        return [_stored.write(old, value, keys.get(leaf.path)) for leaf, value, old in triples]

    def rounding_keys(
        self, paths: Sequence[str], *counts: jax.typing.ArrayLike
    ) -> dict[str, jax.Array]:
        """By its name, per leaf the words that its rounding of these counts is drawn from."""
        if not paths:
            return {}
        base = _keys.fold(self.key, *counts)
        words = _keys.fold_words(base, jnp.stack([self.words[path] for path in paths]))
        # One fold more than for a projection: no rounding shares a key with one.
        words = _keys.fold_words(words, jnp.zeros_like(words))
        return dict(zip(paths, _keys.rows(words), strict=True))


def _digest(
    plan: Sequence[_leaves.Leaf], settings: tuple[Any, ...], arrays: Sequence[_stored.Stored]
) -> np.ndarray:
    """Of what must be the same to read a state; not of names, nor of the order of leaves."""
    digest = _keys.words(settings)
    for leaf, kept in zip(plan, arrays, strict=True):
        bits = (kept.bits,) if isinstance(kept, _stored.Quantized) else ()
        digest = digest + _keys.words((*leaf.geometry, *bits))
    return digest


def parts_of(leaves: Sequence[_leaves.Leaf]) -> list[_leaves.Leaf]:
    """The leaves one sketch each: two of those that have two."""
    return [part for leaf in leaves for part in leaf.parts]


def sending() -> contextlib.AbstractContextManager[None]:
    """Under a `jax.transfer_guard` too: the few numbers of a new state are meant to be sent."""
    allowed: contextlib.AbstractContextManager[None] = jax.transfer_guard_host_to_device("allow")
    return allowed


def is_sketch(node: Any) -> bool:
    """Whether a node of a tree of gradients is a sketch."""
    return isinstance(node, Sketch)


def find(tree: Any, kind: type[T]) -> list[T]:
    """The outermost nodes of a kind in any state, however wrapped, in flattening order."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def replace(tree: Any, nodes: Sequence[Any]) -> Any:
    """The tree with all nodes of the kind that `nodes` are replaced by these, in their order."""
    new, kind = iter(nodes), type(nodes[0])
    return jax.tree.map(
        lambda node: next(new) if isinstance(node, kind) else node,
        tree,
        is_leaf=lambda node: isinstance(node, kind),
    )


def is_stand_in(params: Any) -> bool:
    """Whether `params` is the leafless object with which `optax.tree.map_params` calls `init`.

    Optax puts it where a state holds arrays like the parameters. Sketches are not like them, so
    `init` answers with one leaf in their place, which stands for the whole field.
    """
    from_optax = type(params).__module__.partition(".")[0] == optax.__name__
    return from_optax and not isinstance(params, tuple) and not jax.tree.leaves(params)


def register_with_flax(kind: type[T], fields: Sequence[str]) -> None:
    """Let `flax.serialization`, where somebody has imported it, read and write the named fields."""
    flax = sys.modules.get("flax.serialization")
    if flax is None:
        return

    def write(node: T) -> dict[str, Any]:
        return {name: flax.to_state_dict(getattr(node, name)) for name in fields}

    def read(target: T, saved: dict[str, Any]) -> T:
        new = {name: flax.from_state_dict(getattr(target, name), saved[name]) for name in fields}
        return dataclasses.replace(target, **new)  # type: ignore[type-var]

    flax.register_serialization_state(kind, write, read, override=True)
