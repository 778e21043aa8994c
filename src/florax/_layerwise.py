"""Layer by layer: every layer is updated as its gradient appears, and no other is alive.

The traced loss is cut at its scans over stacked parameters. Forward, each scan keeps the input of
every layer; backward, a loop over the layers in reverse recomputes one layer, takes its gradient,
runs the optimizer on that layer's slice of parameters and state, and writes both back in place.

Source: the fused update of LOMO (Lv et al., 2023, arXiv:2306.09782), which the paper combines with
FLORA in its Appendix C; here for any leaf-wise transformation.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from florax import _dependencies, _jaxprs, _segments, _stacks, _updates, _value_and_grad


def step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    has_aux: bool,
    params: optax.Params,
    state: optax.OptState,
    args: tuple[Any, ...],
    extra_args: dict[str, Any],
) -> tuple[Any, optax.Params, optax.OptState]:
    """What the loss returns, and the updated parameters and state."""
    traced = _value_and_grad.trace_loss(
        loss_fn, 0, has_aux, (params, *args), {}, _jaxprs.trace_flat
    )
    run = _Step(cut(traced, _stacks.all_of(state)))
    values = run.forward()

    def update(gradients: list[jax.Array], values: tuple[Any, Any]) -> tuple[Any, Any]:
        params, state = values
        grads = jax.tree.unflatten(traced.treedef, gradients)
        own = {"value": run.loss, **extra_args}
        updates, new = optax.with_extra_args_support(tx).update(grads, state, params, **own)
        return optax.apply_updates(params, updates), optax.tree.cast_like(new, state)

    whole = _updates.Update(update, run.leaves, (params, state))
    whole.check_leafwise(traced.paths)
    params, state = whole.results(run.backward(whole))
    return traced.result(values), params, state


Weights: TypeAlias = dict[Any, _segments.Weight]


class Cut(NamedTuple):
    """A loss cut at its scans over stacked parameters.

    Attributes:
      traced: the loss, as a function of the parameters.
      segments: ranges of its equations; those that are one such scan come with the parameters that
        it scans over, by variable.
      casts: the numbers of the equations that only cast or transpose a stacked parameter: done
        layer by layer.
      stacked: the numbers of the parameters that are scanned over.
    """

    traced: _value_and_grad.Program
    segments: list[tuple[range, Weights]]
    casts: set[int]
    stacked: set[int]


class _Use(NamedTuple):
    """A use of a stacked parameter.

    Attributes:
      number: of the equation that reads it; None if the loss returns it.
      var: as which it is read.
      order: the parameter's axes as they are there.
    """

    number: int | None
    var: Any
    order: tuple[int, ...]


def cut(traced: _value_and_grad.Program, stacks: Sequence[_stacks.Stack]) -> Cut:
    """Find the scans over what `per_layer` says to be stacks of layers; raise for what has none."""
    said = {path: axis for stack in stacks for path, axis in stack.axes.items()}
    if not said:
        raise ValueError(
            "layerwise=True needs per_layer in tx, to say which leaves are stacks of layers: "
            "value_and_update(loss_fn, florax.per_layer(opt, stacked), layerwise=True)."
        )
    stacked = {leaf: said[path] for leaf, path in enumerate(traced.paths) if path in said}
    while True:
        jaxpr = traced.jaxpr
        followed = {leaf: _follow(jaxpr, leaf) for leaf in stacked}
        found = {use.number for uses, _ in followed.values() for use in uses}
        around = [
            number
            for number in found
            if number is not None
            and jaxpr.eqns[number].primitive.name in _jaxprs.CHECKPOINT
            and _jaxprs.scans(jaxpr.eqns[number])
        ]
        if not around:
            break
        # Layers are recomputed anyway; what else was to be is kept now.
        flat = _jaxprs.flatten(jaxpr, traced.consts, traced.leaves, around)
        traced = traced._replace(jaxpr=flat[0], consts=flat[1])
    scans: dict[int, Weights] = {}
    for leaf, (uses, casts) in followed.items():
        axis = stacked[leaf]
        if problem := _problem(jaxpr, uses, axis):
            height = jnp.shape(traced.leaves[leaf])[axis]
            raise ValueError(
                f"per_layer takes {traced.paths[leaf]} for a stack of {height} layers along axis "
                f"{axis}. For layer by layer the loss must scan over that axis of it once, and "
                f"have no other use of it, but {problem}"
            )
        ((number, var, _),) = uses
        assert number is not None
        own = [(jaxpr.eqns[n], order.index(axis)) for n, order in casts.items()]
        scans.setdefault(number, {})[var] = _segments.Weight(leaf, axis, own)
    segments: list[tuple[range, Weights]] = []
    start = 0
    for number, weights in sorted(scans.items()):
        segments += [(range(start, number), {}), (range(number, number + 1), weights)]
        start = number + 1
    segments.append((range(start, len(jaxpr.eqns)), {}))
    return Cut(traced, segments, {n for _, casts in followed.values() for n in casts}, {*stacked})


def _follow(jaxpr: _jaxprs.Jaxpr, leaf: int) -> tuple[list[_Use], dict[int, tuple[int, ...]]]:
    """The uses of a parameter, and the casts and transposes before, with its axes as they are."""
    var = jaxpr.invars[leaf]
    orders = {var: tuple(range(len(_jaxprs.shape(var))))}
    uses, casts = [], {}
    for number, equation in enumerate(jaxpr.eqns):
        read = [v for v in equation.invars if not isinstance(v, _jaxprs.Literal) and v in orders]
        name = equation.primitive.name
        if read and name in ("convert_element_type", "reshard", "transpose"):
            order = orders[read[0]]
            order = tuple(
                order[axis] for axis in equation.params.get("permutation", range(len(order)))
            )
            casts[number] = orders[equation.outvars[0]] = order
        else:
            uses += [_Use(number, v, orders[v]) for v in read]
    returned = [v for v in jaxpr.outvars if not isinstance(v, _jaxprs.Literal) and v in orders]
    return uses + [_Use(None, v, orders[v]) for v in returned], casts


def _problem(jaxpr: _jaxprs.Jaxpr, uses: Sequence[_Use], axis: int) -> str:
    """What stands against these uses being one scan over that axis, and what to do; else empty."""
    if not uses:
        return "the loss does not use it. Leave it out of stacked."
    scanned: list[int] = []
    said: list[str] = []
    for number, var, order in uses:
        if number is None:
            said.append("the loss returns it")
            continue
        equation = jaxpr.eqns[number]
        what = _jaxprs.describe(equation)
        if equation.primitive.name == "scan":
            if any(var is own for own in _jaxprs.scan(equation, equation.invars).xs):
                scanned.append(order[0])
                said.append(f"{what} goes over axis {order[0]}")
                continue
            what += ", a loop,"
        inside = [_jaxprs.describe(own) for own in _jaxprs.scans(equation) if own is not equation]
        around = f" (around {inside[0]})" if inside else ""
        said.append(f"{what} takes it whole{around}")
    if scanned == [axis] and len(uses) == 1:
        return ""
    if len(uses) == 1 and scanned:
        return f"{said[0]}. Pass axis={scanned[0]} to per_layer."
    counted = [f"{what}, {n} times" if (n := said.count(what)) > 1 else what for what in said]
    return (
        f"{' and '.join(dict.fromkeys(counted))}. Use it in the body of one jax.lax.scan, with "
        "nothing but jit without shardings and jax.checkpoint around, or leave it out of stacked."
    )


class _Step:
    """One step: the segments of the loss forward, then backward with updates.

    Attributes:
      env: values of variables.
      active: the variables that depend on parameters, and so have cotangents.
      loss: its value, once it is known.
    """

    def __init__(self, program: Cut) -> None:
        self.program, self.jaxpr = program, program.traced.jaxpr
        self.leaves = [jnp.asarray(leaf) for leaf in program.traced.leaves]
        variables = (*self.jaxpr.constvars, *self.jaxpr.invars)
        values = (*program.traced.consts, *self.leaves)
        self.env: dict[Any, Any] = dict(zip(variables, values, strict=True))
        labels = [frozenset([number]) for number in range(len(self.leaves))]
        found = _dependencies.labels(self.jaxpr, labels, _passes_on)
        self.active = {var for var, depends_on in found.items() if depends_on}
        self.segments: list[_segments.Segment] = []

    def forward(self) -> list[jax.Array]:
        """What the loss returns."""
        jaxpr, casts = self.jaxpr, self.program.casts
        for numbers, weights in self.program.segments:
            later = [var for equation in jaxpr.eqns[numbers.stop :] for var in equation.invars]
            used = {v for v in (*jaxpr.outvars, *later) if not isinstance(v, _jaxprs.Literal)}
            if not weights:
                equations = [jaxpr.eqns[n] for n in numbers if n not in casts]
                own: _segments.Segment = _segments.Plain(equations, self.env, self.active, used)
            else:
                scan = jaxpr.eqns[numbers.start]
                own = _segments.Layers(scan, weights, self.leaves, self.env, self.active, used)
            self.segments.append(own)
        values = _jaxprs.read(self.env, jaxpr.outvars)
        self.loss = values[0]
        return values

    def backward(self, update: _updates.Update) -> dict[int, jax.Array]:
        """Give every gradient to the update as it appears; the successors of what layers have."""
        jaxpr, cotangents = self.jaxpr, _segments.Cotangents(self.env)
        cotangents.add([jaxpr.outvars[0]], [jnp.ones_like(self.loss)])
        replaced: dict[int, jax.Array] = {}
        waiting = {i: var for i, var in enumerate(jaxpr.invars) if i not in self.program.stacked}
        segments = list(zip(self.program.segments, self.segments, strict=True))
        for (numbers, _), segment in reversed(segments):
            replaced |= segment.backward(cotangents, update)
            # What no earlier segment reads has its whole gradient: updated now, not kept.
            read = {id(v) for equation in jaxpr.eqns[: numbers.start] for v in equation.invars}
            for leaf in [leaf for leaf, var in waiting.items() if id(var) not in read]:
                update.give(leaf, cotangents.take(waiting.pop(leaf)))
            cotangents.replace(update.before(cotangents.values()))
        return replaced


def _passes_on(equation: _jaxprs.Equation, inputs: list[Any]) -> list[Any]:
    """Gradients reach what is computed in floating-point numbers from floating-point numbers."""
    together = frozenset[int]().union(*inputs)
    return [together if _segments.is_inexact(var) else frozenset() for var in equation.outvars]
