"""Layer by layer: every layer is updated as its gradient appears, and no other is alive.

The traced loss is cut at its scans over stacked parameters. Forward, each scan keeps the input of
every layer; backward, a loop over the layers in reverse recomputes one layer, takes its gradient,
runs the optimizer on that layer's slice of parameters and state, and writes both back in place.

Source: the fused update of LOMO (Lv et al., 2023, arXiv:2306.09782), which the paper combines with
FLORA in its Appendix C; here for any leaf-wise transformation.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from florax import _jaxprs, _segments, _stacks, _updates, _value_and_grad


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
    program = cut(traced, _stacks.all_of(state))
    run = _Step(program)
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


class Scan(NamedTuple):
    """A scan over stacked parameters.

    Attributes:
      number: of its equation.
      weights: by variable of the scan's stacked input, the parameter's number and the casts between
        them.
    """

    number: int
    weights: dict[Any, tuple[int, list[_jaxprs.Equation]]]

    @property
    def leaves(self) -> list[int]:
        """The numbers of the parameters."""
        return sorted(leaf for leaf, _ in self.weights.values())


class Cut(NamedTuple):
    """A loss cut at its scans over stacked parameters.

    Attributes:
      traced: the loss, as a function of the parameters.
      segments: ranges of its equations; those that are one such scan come with it.
      casts: the numbers of the equations that only cast a stacked parameter: done layer by layer.
      stacked: the numbers of the parameters that are scanned over.
    """

    traced: _value_and_grad.Program
    segments: list[tuple[range, Scan | None]]
    casts: set[int]
    stacked: set[int]


def cut(traced: _value_and_grad.Program, stacks: Sequence[_stacks.Stack]) -> Cut:
    """Find the scans over what `per_layer` says to be stacks of layers; raise for what has none."""
    if not any(stack.paths for stack in stacks):
        raise ValueError(
            "layerwise=True needs per_layer in tx, to say which leaves are stacks of layers: "
            "value_and_update(loss_fn, florax.per_layer(opt, stacked), layerwise=True)."
        )
    jaxpr, paths = traced.jaxpr, traced.paths
    said = {path: stack.height for stack in stacks for path in stack.paths}
    scans = _scans(jaxpr)
    found = {leaf for scan in scans for leaf in scan.leaves}
    for leaf, path in enumerate(paths):
        if path in said and leaf not in found:
            raise ValueError(
                f"per_layer takes {path} for a stack of {said[path]} layers, but no scan of the "
                "loss has it for a scanned input and is its only use. Looked for is a jax.lax.scan "
                "at the top level of the loss (jit may be around it, no other transformation). "
                f"Found: {'; '.join(_describe(scan, jaxpr, paths) for scan in scans) or 'none'}. "
                "Scan over the layers of the model, or leave the leaf out of stacked."
            )
    # A scan over leaves that nobody called layers is a part of the program like any other.
    chosen = [
        Scan(scan.number, own)
        for scan in scans
        if (own := {v: w for v, w in scan.weights.items() if paths[w[0]] in said})
    ]
    segments: list[tuple[range, Scan | None]] = []
    start = 0
    for scan in chosen:
        segments += [(range(start, scan.number), None), (range(scan.number, scan.number + 1), scan)]
        start = scan.number + 1
    segments.append((range(start, len(jaxpr.eqns)), None))
    cast = {id(cast) for scan in chosen for _, casts in scan.weights.values() for cast in casts}
    casts = {number for number, equation in enumerate(jaxpr.eqns) if id(equation) in cast}
    return Cut(traced, segments, casts, {leaf for scan in chosen for leaf in scan.leaves})


def _scans(jaxpr: _jaxprs.Jaxpr) -> list[Scan]:
    """All scans, with the parameters that they scan over and that have no other use."""
    uses: dict[Any, int] = {}
    for var in (*jaxpr.outvars, *(var for equation in jaxpr.eqns for var in equation.invars)):
        if not isinstance(var, _jaxprs.Literal):
            uses[var] = uses.get(var, 0) + 1
    made = {var: equation for equation in jaxpr.eqns for var in equation.outvars}
    numbers = {var: number for number, var in enumerate(jaxpr.invars)}

    def parameter(var: Any) -> tuple[int, list[_jaxprs.Equation]] | None:
        """The parameter that a variable is a cast of, if it has no other use."""
        casts: list[_jaxprs.Equation] = []
        while not isinstance(var, _jaxprs.Literal) and uses.get(var) == 1:
            if var in numbers:
                return numbers[var], casts[::-1]
            if var not in made or made[var].primitive.name != "convert_element_type":
                break
            casts.append(made[var])
            var = made[var].invars[0]
        return None

    return [
        Scan(
            number,
            {
                var: found
                for var in _jaxprs.scan(equation, equation.invars).xs
                if (found := parameter(var)) is not None
            },
        )
        for number, equation in enumerate(jaxpr.eqns)
        if equation.primitive.name == "scan"
    ]


def _describe(scan: Scan, jaxpr: _jaxprs.Jaxpr, paths: Sequence[str]) -> str:
    equation = jaxpr.eqns[scan.number]
    over = ", ".join(paths[leaf] for leaf in scan.leaves) or "no parameters"
    return f"{_jaxprs.describe(equation)} of length {equation.params['length']} over {over}"


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
        found = _jaxprs.labels(self.jaxpr, labels, _passes_on)
        self.active = {var for var, depends_on in found.items() if depends_on}
        self.segments: list[_segments.Segment] = []

    def forward(self) -> list[jax.Array]:
        """What the loss returns."""
        jaxpr, casts = self.jaxpr, self.program.casts
        for numbers, scan in self.program.segments:
            later = [var for equation in jaxpr.eqns[numbers.stop :] for var in equation.invars]
            used = {v for v in (*jaxpr.outvars, *later) if not isinstance(v, _jaxprs.Literal)}
            if scan is None:
                equations = [jaxpr.eqns[n] for n in numbers if n not in casts]
                own: _segments.Segment = _segments.Plain(equations, self.env, self.active, used)
            else:
                weights = {
                    var: _segments.Weight(self.leaves[leaf], leaf, casts)
                    for var, (leaf, casts) in scan.weights.items()
                }
                own = _segments.Layers(
                    jaxpr.eqns[scan.number], weights, self.env, self.active, used
                )
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
