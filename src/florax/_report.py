"""What is compressed, what is not and why, and the bytes of both: before training."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from florax import _calls, _jaxprs, _sketches, _stored, _value_and_grad


class ReportRow(NamedTuple):
    """One leaf in one FLORA state.

    Attributes:
      transformation: `"flora_accumulate"` or `"flora_momentum"`.
      path: the leaf's key path, as in `['layers'][0]['kernel']`.
      shape: shape of the parameter.
      rank: rank of its sketch; None if it is kept dense.
      side: size m of the projected side; None if it is kept dense.
      across: where both sides are projected, rank and size of the other; else None.
      reason: why it is kept dense; empty if it is compressed.
      dtype: of what the state keeps for it, by its name.
      state_bytes: bytes of that; of integers and their scales.
      full_bytes: bytes of a full-size buffer in the same dtype; for integers, in float32, or in the
        parameter's if wider.
    """

    transformation: str
    path: str
    shape: tuple[int, ...]
    rank: int | None
    side: int | None
    across: tuple[int, int] | None
    reason: str
    dtype: str
    state_bytes: int
    full_bytes: int


@dataclasses.dataclass(frozen=True)
class StateReport:
    """What FLORA keeps for every leaf; prints as a table.

    Attributes:
      rows: one `ReportRow` per leaf and transformation.
    """

    rows: tuple[ReportRow, ...]

    @property
    def state_bytes(self) -> int:
        """Bytes that FLORA keeps, in sketches and in leaves kept dense."""
        return sum(row.state_bytes for row in self.rows)

    @property
    def full_bytes(self) -> int:
        """Bytes that full-size buffers of the same dtypes would take."""
        return sum(row.full_bytes for row in self.rows)

    def __str__(self) -> str:
        """The table."""
        lines: list[tuple[str, ...]] = []
        for transformation in dict.fromkeys(row.transformation for row in self.rows):
            rows = [row for row in self.rows if row.transformation == transformation]
            part = StateReport(tuple(rows))
            sizes = _sizes(part.state_bytes, part.full_bytes)
            total = (f"total of {len(rows)} leaves", "", "", "", "", *sizes, "")
            lines += [(transformation,), _HEADER, *map(_cells, rows), total]
        return "\n".join([_table(lines, "<<>><>>><"), *self.notes])

    @property
    def notes(self) -> list[str]:
        """What looks like a mistake, which is stacks of vectors beside stacks of matrices."""
        return [
            f"Note: {row.path} of shape {_shape(row.shape)} is compressed as one matrix, while "
            f"{stack.path} of shape {_shape(stack.shape)} is kept dense. If both are stacks of "
            f"{row.shape[0]} layers, say so with florax.per_layer, or with dimension_numbers."
            for row, stack in itertools.product(self.rows, self.rows)
            if row.rank
            and len(row.shape) == 2
            and stack.reason.endswith("no dimension_numbers")
            and stack.shape[0] == row.shape[0]
        ][:1]


def state_report(tx: optax.GradientTransformation, params: Any) -> StateReport:
    """Say, before training, what `tx` compresses, what it does not and why, and what that saves.

    Args:
      tx: any Optax transformation with `flora_accumulate` or `flora_momentum` somewhere in it.
      params: the parameters, or their shapes (`jax.ShapeDtypeStruct`); nothing is allocated.

    Returns:
      A `StateReport`: `rows`, `state_bytes`, `full_bytes`; printing it shows a table.

    Raises:
      ValueError: there is no FLORA state in the state of `tx`.

    >>> import florax, jax, jax.numpy as jnp, optax
    >>> shapes = {"bias": (6400,), "kernel": (1600, 6400)}
    >>> params = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
    >>> tx = optax.chain(optax.adafactor(1e-3), florax.flora_momentum(rank=256))
    >>> print(florax.state_report(tx, params))
    flora_momentum
    leaf           shape      rank  side  dtype    state      full size  share   kept dense because
    ['bias']       6400       -     -     float32   25.0 KiB   25.0 KiB  100.0%  1-D
    ['kernel']     1600×6400  256   1600  float32    6.2 MiB   39.1 MiB   16.0%
    total of 2 leaves                                6.3 MiB   39.1 MiB   16.1%

    Source: the memory of sketches against full-size buffers, Hao et al., 2024 (arXiv:2402.03293).
    """
    sketches = _sketches.find(jax.eval_shape(tx.init, params), _sketches.Sketches)
    rows = [row for own in sketches for row in _rows(own)]
    if not rows:
        raise ValueError(
            f"tx keeps no FLORA state for these parameters, got {tx!r}. Pass the whole optimizer, "
            "with flora_accumulate or flora_momentum in it."
        )
    return StateReport(tuple(rows))


def _rows(sketches: _sketches.Sketches) -> list[ReportRow]:
    rows = []
    rest = iter(sketches.leaves())
    for leaf in sketches.plan:
        parts = [next(rest) for _ in leaf.parts]
        # In `per_layer` a leaf is a layer's, and what is kept has a leading axis of layers.
        kept = parts[0]
        layers = kept.shape[: kept.ndim - len(leaf.stored_shape)]
        shape, full = (*layers, *leaf.shape), kept.dtype
        if _stored.is_quantized(kept):
            full = jnp.promote_types(leaf.dtype, jnp.float32)
        rank, side = leaf.projected or (None, None)
        rows.append(
            ReportRow(
                sketches.settings[0],
                leaf.path,
                shape,
                rank,
                side,
                None if leaf.across is None else leaf.across.projected,
                leaf.reason,
                kept.dtype.name,
                sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(parts)),
                math.prod(shape) * full.itemsize,
            )
        )
    return rows


class GradientRow(NamedTuple):
    """How one leaf's gradient comes to be.

    Attributes:
      path: the leaf's key path.
      shape: shape of the parameter.
      sketch: shape of its sketch; None if its gradient is dense.
      across: where both sides are projected, shape of the other sketch; else None.
      reason: why it is dense; empty if it is not.
      dense_uses: the uses of a sketched one whose own gradients are dense until they are compressed
        on the spot: the operations and their lines.
    """

    path: str
    shape: tuple[int, ...]
    sketch: tuple[int, ...] | None
    across: tuple[int, ...] | None
    reason: str
    dense_uses: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class GradientReport:
    """Which gradients are born compressed; prints as a table.

    Attributes:
      rows: one `GradientRow` per leaf.
    """

    rows: tuple[GradientRow, ...]

    def __str__(self) -> str:
        """The table."""
        lines = [("leaf", "shape", "gradient", "dense because of")]
        for row in self.rows:
            gradient = "dense" if row.sketch is None else f"sketch {_shape(row.sketch)}"
            gradient += f" and {_shape(row.across)}" if row.across else ""
            gradient += ", dense in part" if row.dense_uses else ""
            first, *more = row.dense_uses or (row.reason,)
            lines.append((row.path, _shape(row.shape), gradient, first))
            lines += [("", "", "", use) for use in more]
        return "\n".join([_table(lines, "<<<<"), *self.notes])

    @property
    def notes(self) -> list[str]:
        """What can be done about uses whose gradients are dense."""
        uses = [use for row in self.rows for use in row.dense_uses]
        if not uses:
            return []
        notes = [
            "Note: the uses named make gradients of full size, each compressed as soon as it is "
            "there. A penalty is cheaper as optax.add_decayed_weights; what shall have no gradient "
            "belongs into jax.lax.stop_gradient."
        ]
        if any("side" in use for use in uses):
            notes.append(
                "Another side, or dimension_numbers, may keep the projected side together."
            )
        return notes


def gradient_report(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *args: Any,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    **kwargs: Any,
) -> GradientReport:
    """Say, before training, which gradients `value_and_grad` makes as sketches, and why not others.

    Every compressed leaf has a sketch for its gradient; this also names those of its uses that
    cannot be followed, each with the operation and its line. Such a use has a gradient of full size
    for a moment.

    Args:
      loss_fn: the loss.
      tx: the optimizer: as for `value_and_grad`.
      *args: arguments of the loss, or their shapes (`jax.ShapeDtypeStruct`).
      argnums: as for `value_and_grad`.
      has_aux: as for `value_and_grad`.
      **kwargs: of the loss.

    Returns:
      A `GradientReport`; printing it shows a table.

    Raises:
      ValueError, TypeError: as `value_and_grad`.

    >>> import florax, jax.numpy as jnp, optax
    >>> def loss_fn(params, x):
    ...     return jnp.mean(x @ params["in"] @ jnp.tanh(params["out"]))
    >>> tx = florax.flora_accumulate(optax.sgd(0.1), every_k_schedule=4, rank=2)
    >>> params = {"in": jnp.ones((8, 4)), "out": jnp.ones((4, 4))}
    >>> print(florax.gradient_report(loss_fn, tx, params, jnp.ones((16, 8))))
    leaf     shape  gradient                   dense because of
    ['in']   8×4    sketch 8×2
    ['out']  4×4    sketch 4×2, dense in part  tanh at ...
    Note: ...

    Source: beyond the paper; see `value_and_grad`.
    """
    rows: list[GradientRow] = []

    def probe(traced: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        program = _value_and_grad.trace_loss(loss_fn, argnums, has_aux, traced, keywords)
        params = program.treedef.unflatten(program.leaves)
        state = tx.init(params)
        found = _value_and_grad.born(tx, state, program)
        obstacles = _value_and_grad.obstacles(program, found)
        seen = _calls.look(tx, state, params)
        planned = {leaf.path: leaf.reason for own in seen for leaf in own.sketch.plan}
        for i, (path, leaf) in enumerate(zip(program.paths, program.leaves, strict=True)):
            reason = planned.get(path, "not of the FLORA transformation")
            sketch, across = (
                found[number].leaf.stored_shape if number in found else None
                for number in (i, i + len(program.leaves))
            )
            row = GradientRow(path, jnp.shape(leaf), sketch, across, reason, obstacles.get(i, ()))
            rows.append(row)

    _jaxprs.abstractly(probe, args, kwargs)
    return GradientReport(tuple(rows))


_HEADER = (
    *("leaf", "shape", "rank", "side", "dtype", "state", "full size", "share"),
    "kept dense because",
)


def _cells(row: ReportRow) -> tuple[str, ...]:
    rank, side = ("-", "-") if row.rank is None else (str(row.rank), str(row.side))
    if row.across is not None:
        rank, side = f"{rank} + {row.across[0]}", f"{side} + {row.across[1]}"
    sizes = _sizes(row.state_bytes, row.full_bytes)
    return (row.path, _shape(row.shape), rank, side, row.dtype, *sizes, row.reason)


def _sizes(state_bytes: int, full_bytes: int) -> tuple[str, str, str]:
    share = f"{state_bytes / full_bytes:.1%}" if full_bytes else "-"
    return _bytes(state_bytes), _bytes(full_bytes), share


def _bytes(count: float) -> str:
    if count < 1024:
        return f"{count:.0f} B"
    exponent = min(int(math.log2(count) // 10), 4)
    return f"{count / 1024**exponent:.1f} {('KiB', 'MiB', 'GiB', 'TiB')[exponent - 1]}"


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _table(lines: Sequence[tuple[str, ...]], alignment: str) -> str:
    """Lines of cells, each column aligned; a line of one cell is a title."""
    columns = zip(*(line for line in lines if len(line) > 1), strict=True)
    widths = [max(map(len, column)) for column in columns]
    padded = (
        [f"{cell:{to}{n}}" for cell, to, n in zip(line, alignment, widths, strict=len(line) > 1)]
        for line in lines
    )
    return "\n".join("  ".join(cells).rstrip() for cells in padded)
