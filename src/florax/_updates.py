"""An Optax update taken apart: leaf by leaf, and of stacks of layers layer by layer.

What needs which gradients is read from the traced update, not from a list of names, and whatever
stands around or inside of what: Adam's results come out one by one, what mixes leaves (clipping by
the global norm) comes out whole, and a stack is updated a layer at a time where its update is a map
over the layers (`per_layer`, and entry-wise operations before and after it).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from florax import _dependencies, _jaxprs, _stacks

Maker = Callable[[Any], jax.Array]
Keeper = Callable[[int, jax.Array], jax.Array]


class NoMap(ValueError):
    """An update takes a stack of layers as a whole."""

    def __init__(self, operation: str) -> None:
        super().__init__(
            "tx does not update layers one by one: outside of per_layer it takes a whole stack in "
            f"{operation}. Put all but entry-wise operations inside of per_layer."
        )


class Layers(NamedTuple):
    """The part of an update that is a map over the layers of a stack.

    Attributes:
      height: how many layers there are.
      axes: per variable that is a stack, the axis of the layers.
      gradients: the numbers of the gradients that enter it.
      replaced: the numbers of the values that it replaces.
      equations: those of a layer.
      sliced: variables that are read layer by layer, and not replaced.
      whole: variables that every layer reads as they are.
    """

    height: int
    axes: Mapping[Any, int]
    gradients: Sequence[int]
    replaced: Sequence[int]
    equations: Sequence[_jaxprs.Equation]
    sliced: Sequence[Any]
    whole: Sequence[Any]


class Update:
    """One update, to which gradients are given one by one, and which proceeds as far as they go."""

    def __init__(
        self,
        function: Callable[[list[jax.Array], Any], Any],
        likes: Sequence[jax.Array],
        values: Any,
        runs: jax.Array | None = None,
        keep: Keeper = lambda number, value: value,
    ) -> None:
        """Trace `function(gradients, values)`, which returns a successor for every value.

        Args:
          function: the update.
          likes: arrays like the gradients.
          values: a tree of what the update replaces: the leaves that the gradients are of first,
            then states.
          runs: whether the effects of the update (callbacks) happen; None: they do.
          keep: what becomes of the successor of a value, by its number.
        """
        self._jaxpr, consts, _ = _jaxprs.trace_flat(function, list(likes), values)
        flat, self._treedef = jax.tree.flatten(jax.tree.map(jnp.asarray, values))
        self._count, self._runs, self._keep = len(likes), runs, keep
        self._gradients = self._jaxpr.invars[: self._count]
        self._values = self._jaxpr.invars[self._count :]
        self._inputs: dict[Any, Any] = dict(zip(self._jaxpr.constvars, consts, strict=True))
        self._inputs.update(zip(self._values, flat, strict=True))
        self._makers: dict[Any, Maker] = {}
        self._needs = self.depends(rule=_dependencies.whole_equations)
        self._waiting = dict(enumerate(self._needs))
        self._given: set[int] = set()
        self._env: dict[Any, Any] = {}
        self._done: set[int] = set()  # equations
        self._kept: dict[int, Any] = {}
        self._last: list[int] = []  # the successors that were computed last

    def give(self, number: int, source: Any, make: Maker = lambda gradient: gradient) -> None:
        """Give the gradient of leaf `number`, which is made from its source when it is needed.

        That is an array, or a tree of them.
        """
        var = self._gradients[number]
        self._inputs[var], self._makers[var] = source, make
        self._given.add(number)
        ready = [i for i, needed in self._waiting.items() if needed and needed <= self._given]
        for i in ready:
            del self._waiting[i]
        self._succeed(ready)

    def results(self, replaced: dict[int, jax.Array] | None = None) -> Any:
        """The successors of the values, once all gradients are given.

        Those that layers have `replaced` come from there.
        """
        self._succeed([*self._waiting])
        effects = [n for n, e in enumerate(self._jaxpr.eqns) if e.effects and n not in self._done]
        self._compute([var for n in effects for var in self._jaxpr.eqns[n].invars])
        self._run(n for n in effects if n not in self._done)
        kept = {**self._kept, **(replaced or {})}
        return jax.tree.unflatten(self._treedef, [kept[i] for i in range(len(self._values))])

    def before(self, values: Any) -> Any:
        """`values`, to be there only when what is computed so far is."""
        # Left alone, XLA may make all gradients first, and update then.
        values, finished = jax.lax.optimization_barrier(  # type: ignore[no-untyped-call]
            (values, [self._kept[i] for i in self._last])
        )
        self._kept.update(zip(self._last, finished, strict=True))
        return values

    def depends(
        self, labels: Sequence[int | None] | None = None, rule: _dependencies.Rule | None = None
    ) -> list[frozenset[int]]:
        """Per value the gradients that its successor depends on, and the labels of other values."""
        gradients = [frozenset([number]) for number in range(self._count)]
        own = [frozenset() if n is None else frozenset([n]) for n in labels or ()]
        own += [frozenset()] * (len(self._values) - len(own))
        return _dependencies.dependencies(self._jaxpr, [*gradients, *own], rule)

    def stays(self, number: int) -> bool:
        """Whether a value is its own successor."""
        return self._jaxpr.outvars[number] is self._values[number]

    def check_leafwise(self, paths: Sequence[str]) -> None:
        """Raise if the update of a leaf, now or later, depends on another leaf's gradient.

        What states hold of a gradient comes back.
        """
        count = len(paths)
        own = [frozenset([number]) for number in range(count)]
        held = [frozenset[int]()] * (len(self._values) - count)
        while True:
            depends = _dependencies.dependencies(self._jaxpr, [*own, *own, *held])
            grown = [old | new for old, new in zip(held, depends[count:], strict=True)]
            if grown == held:
                break
            held = grown
        for number, labels in enumerate(depends[:count]):
            for other in sorted(labels - {number}):
                raise ValueError(
                    f"tx mixes leaves: the update of {paths[number]} depends on the gradient of "
                    f"{paths[other]}, which may not exist when it is updated. Leave out what needs "
                    "all gradients, such as clipping by the global norm (optax.clip_by_block_rms "
                    "clips by leaf), or layerwise=True."
                )

    # --- layers

    def layers(self, group: Mapping[int, int], height: int) -> Layers:
        """Take out the part that a group of gradients enters, all of them stacks of that height.

        By number it gives the axis of their layers. Raises `NoMap` where that is no map over them.
        """
        jaxpr, chosen, exact = self._jaxpr, frozenset(group), self.depends()
        replaced = [
            i
            for i in self._waiting
            # A layer's count depends on no gradient, but stands in the map that they enter.
            if exact[i] & chosen or (not exact[i] and self._needs[i] & chosen)
        ]
        if any(exact[i] - chosen for i in replaced):
            raise NoMap("what depends on several")
        outputs = [jaxpr.outvars[i] for i in replaced]
        numbers, _ = _dependencies.needed(jaxpr, outputs)
        own = [frozenset([n]) for n in range(self._count)]
        none = [frozenset[int]()] * len(self._values)
        labels = _dependencies.labels(jaxpr, [*own, *none], _dependencies.whole_equations)
        axes: dict[Any, int] = {}
        for i, axis in group.items():
            axes[self._gradients[i]] = axes[self._values[i]] = axis
        _jaxprs.spread([jaxpr.eqns[number] for number in numbers], height, axes)
        for i, var in zip(replaced, outputs, strict=True):
            if var in axes and axes.setdefault(self._values[i], axes[var]) != axes[var]:
                raise NoMap("what moves the axis of the layers")
        equations: list[_jaxprs.Equation] = []
        reads: dict[Any, None] = {}
        for number in numbers:
            equation = jaxpr.eqns[number]
            along = _jaxprs.mapped(equation, height, axes)
            if along is not None:
                equations.append(equation)
                reads.update((var, None) for var, _ in along if var not in equation.outvars)
                if any(axes.get(var) != axis for var, axis in along):
                    raise NoMap(_jaxprs.describe(equation))
            elif any(labels[var] & chosen for var in equation.outvars):
                raise NoMap(_jaxprs.describe(equation))
        made = {var for equation in equations for var in equation.outvars}
        known = {*made, *self._gradients, *(self._values[i] for i in replaced)}
        read = [var for var in reads if var not in known]
        if any(labels.get(var) for var in read) or not {*outputs} <= made:
            raise NoMap("what depends on other leaves")
        for i in replaced:
            del self._waiting[i]
        self._done.update(
            n for n in numbers if jaxpr.eqns[n].effects and jaxpr.eqns[n] in equations
        )
        sliced = [var for var in read if var in axes]
        whole = [var for var in read if var not in axes]
        return Layers(height, axes, [*group], replaced, equations, sliced, whole)

    def run_layers(
        self,
        layers: Layers,
        give: Callable[[jax.Array, "Update", list[jax.Array], Any], Any],
        carry: Any = None,
        *,
        reverse: bool = False,
    ) -> tuple[dict[int, jax.Array], Any]:
        """Update a stack in place, a layer at a time.

        Args:
          layers: of this update.
          give: `(index, update, leaves, carry) -> carry` gives a layer's update its gradients, in
            the order of `layers.gradients`; `leaves` are the layer's own, before the update.
          carry: what a layer hands on to the next.
          reverse: from the last layer to the first.

        Returns:
          By their number the values that are replaced, and the last carry.
        """
        self._compute([*layers.sliced, *layers.whole])
        sliced, whole = (_jaxprs.read(self._env, own) for own in (layers.sliced, layers.whole))
        axes = layers.axes
        values = {i: self._inputs[self._values[i]] for i in layers.replaced}
        others = {i: self._inputs[self._values[i]] for i in layers.gradients if i not in values}
        outputs = [self._jaxpr.outvars[i] for i in layers.replaced]
        numbers = sorted(values)  # in which order a layer's `Update` has them
        axes_of_values = {i: axes[self._values[i]] for i in (*values, *others)}
        frozen_axes = {i: axes_of_values.pop(i) for i in others}

        def apply(equation: _jaxprs.Equation, operands: list[Any]) -> Sequence[Any]:
            return _jaxprs.run_one_layer(equation, operands, axes[equation.outvars[0]])

        def body(index: jax.Array, stacks: dict[int, jax.Array], carry: Any) -> Any:
            own = _stacks.take(stacks, index, axes_of_values)

            def keep(number: int, value: jax.Array) -> jax.Array:
                i = numbers[number]
                stack: jax.Array = _stacks.put(stacks[i], value, index, axes_of_values[i])
                return stack

            fixed = _stacks.take(sliced, index, [axes[var] for var in layers.sliced])
            frozen = _stacks.take(others, index, frozen_axes)
            leaves = [own[i] if i in own else frozen[i] for i in layers.gradients]

            def function(gradients: list[jax.Array], own: dict[int, jax.Array]) -> Any:
                # Gradients of other stacks play no part, though an equation may mention them.
                env = {
                    v: jnp.zeros(_jaxprs.layer_shape(v, axes[v]), _jaxprs.dtype(v))
                    for v in self._gradients
                    if v in axes
                }
                env.update(zip(layers.whole, whole, strict=True))
                env.update(zip(layers.sliced, fixed, strict=True))
                env.update((self._values[i], value) for i, value in own.items())
                pairs = zip(layers.gradients, gradients, strict=True)
                env.update((self._gradients[i], gradient) for i, gradient in pairs)
                _jaxprs.advance(env, layers.equations, apply)
                return dict(zip(own, _jaxprs.read(env, outputs), strict=True))

            # Put where it belongs at once: on the way out a layer's would be one more copy.
            update = Update(function, leaves, own, self._runs, keep)
            carry = give(index, update, leaves, carry)
            return update.results(), carry

        return _stacks.over_layers(layers.height, body, values, carry, reverse=reverse)

    # --- inside

    def _succeed(self, numbers: Sequence[int]) -> None:
        """Compute successors of values."""
        outputs = [self._jaxpr.outvars[i] for i in numbers]
        self._compute(outputs)
        for i, value in zip(numbers, _jaxprs.read(self._env, outputs), strict=True):
            self._kept[i] = self._keep(i, value)
        self._last = [*numbers] or self._last

    def _compute(self, results: Sequence[Any]) -> None:
        results = [var for var in results if not isinstance(var, _jaxprs.Literal)]
        if not results:
            return
        numbers, wanted = _dependencies.needed(self._jaxpr, results)
        fresh = [var for var in self._inputs if var in wanted and var not in self._env]
        values = self.before([self._inputs[var] for var in fresh])
        for var, value in zip(fresh, values, strict=True):
            self._env[var] = self._makers[var](value) if var in self._makers else value
        self._run(number for number in numbers if number not in self._done)

    def _run(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._done.add(number)
            _jaxprs.advance(self._env, [self._jaxpr.eqns[number]], self._apply)

    def _apply(self, equation: _jaxprs.Equation, operands: list[Any]) -> Sequence[Any]:
        if not equation.effects or self._runs is None:
            return _jaxprs.run(equation, operands)
        zeros = [jnp.zeros(_jaxprs.shape(v), _jaxprs.dtype(v)) for v in equation.outvars]
        run: Sequence[Any] = jax.lax.cond(
            self._runs, lambda: _jaxprs.run(equation, operands), lambda: zeros
        )
        return run
