"""Accumulators that the backward pass reads, adds to, rounds and writes back, a part at a time.

What is kept in floats is carried backward through the program as a cotangent (`_uses.record`).
Integers have no cotangents: they stand in references, and where a weight enters a loop over layers
the backward pass of that place has the whole gradient, or sketch, of one layer, and writes it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from florax import _meshes, _stored, _views


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slot:
    """Where an accumulator is written; a pytree, so that it can be handed into inner programs.

    Attributes:
      words: a reference to the words of a `Quantized` array.
      scales: one to its scales.
      key: of the rounding, two words.
      pulse: zero; what is differentiated by, for the backward pass to come here.
      trail: of the array; static.
      bits: of the array; static.
      along: how the words are divided on an explicit mesh; static.
      varying: the axes of a `shard_map` along which devices have words of their own; static.
    """

    words: Any
    scales: Any
    key: jax.Array
    pulse: jax.Array
    trail: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    along: _meshes.Division = dataclasses.field(metadata={"static": True})
    varying: frozenset[str] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, stored: _stored.Quantized) -> "Slot":
        """A new one, which `array` ends; the key and the pulse are given later."""
        words, scales = jax.new_ref(stored.words), jax.new_ref(stored.scales)
        along = _meshes.division(stored.words, range(stored.words.ndim))
        none, varying = jnp.zeros([]), _meshes.varying(stored.words)
        return cls(words, scales, none, none, stored.trail, stored.bits, along, varying)

    def array(self) -> _stored.Quantized:
        """What was written."""
        words, scales = jax.freeze(self.words), jax.freeze(self.scales)
        return _stored.Quantized(words, scales, self.trail, self.bits)

    def can_write(self, view: _views.View) -> bool:
        """Whether a part of a weight can be written by itself: whether no block is divided."""
        return self._part(view) is not None

    def total(
        self, view: _views.View, positions: tuple[jax.Array, ...]
    ) -> tuple[_views.View, jax.Array]:
        """What uses of a part of a weight add to: nothing yet; and the part's view of it.

        It enters the accumulator once the backward pass has all of these uses behind it.
        """
        part = self._part(view)
        assert part is not None
        shape = (*view.sketch.own().shape, *((view.leaf.rank,) if view.leaf.rank else ()))
        return view.with_own_sketch(), _total(part, shape, self, positions)

    def _part(self, view: _views.View) -> _views.Part | None:
        """The part in view of what stands before the blocks."""
        return view.sketch.leading(len(self.trail) - (view.leaf.rank is not None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _total(
    part: _views.Part, shape: tuple[int, ...], slot: Slot, positions: tuple[jax.Array, ...]
) -> jax.Array:
    """Zeros, whose cotangent is added to what the slot holds of a part of a weight."""
    named = sorted(axis for axis in part.axes if axis is not None)
    is_moved = any(step.kind == "reshape" for step in part.steps)
    along = () if is_moved else (*(slot.along[axis] for axis in named), slot.along[-1])
    zeros = _meshes.divide(jnp.zeros(shape, jnp.float32), along[: len(shape)])
    return jax.lax.pcast(zeros, tuple(slot.varying), to="varying") if slot.varying else zeros


def _forward(
    part: _views.Part, shape: tuple[int, ...], slot: Slot, positions: tuple[jax.Array, ...]
) -> tuple[jax.Array, Any]:
    return _total(part, shape, slot, positions), (slot, positions)


def _backward(part: _views.Part, shape: tuple[int, ...], kept: Any, total: jax.Array) -> Any:
    slot, positions = kept
    whole = _stored.Quantized(slot.words[...], slot.scales[...], slot.trail, slot.bits)
    rows = part.take(_stored.row_numbers(whole), positions)
    old = dataclasses.replace(
        whole,
        words=part.take(whole.words, positions),
        scales=part.take(whole.scales, positions),
    )
    new = _stored.write(old, _stored.read(old) + total.reshape(old.shape), slot.key, rows)
    assert isinstance(new, _stored.Quantized)
    slot.words[...] = part.update(whole.words, positions, lambda _: new.words)
    slot.scales[...] = part.update(whole.scales, positions, lambda _: new.scales)
    pulse = jnp.zeros_like(slot.pulse)
    return dataclasses.replace(slot, words=None, scales=None, key=None, pulse=pulse), None


_total.defvjp(_forward, _backward)
