"""An Optax update taken leaf by leaf, so that one leaf's full-size gradient is alive at a time.

Which results need which gradients is read from the traced update, not from a list of names: Adam's
come out one by one, and what mixes leaves (clipping by the global norm) comes out whole.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from florax import _jaxprs


def update_and_apply(
    opt: optax.GradientTransformationExtraArgs,
    gradients: Sequence[Callable[[jax.Array], jax.Array]],
    sources: Sequence[jax.Array],
    state: optax.OptState,
    params: optax.Params,
    extra_args: dict[str, Any],
) -> tuple[optax.Params, optax.OptState]:
    """Update the parameters, making each gradient when it is first needed.

    Args:
      opt: the transformation.
      gradients: per leaf a function that makes its gradient, like the parameter, from its source.
      sources: per leaf an array: what of the gradient is kept.
      state: of `opt`.
      params: the parameters.
      extra_args: for `opt`.

    Returns:
      The new parameters and the new state of `opt`.
    """
    update = LeafwiseUpdate(opt, state, params, extra_args)
    for number, (make, source) in enumerate(zip(gradients, sources, strict=True)):
        update.give(number, source, make)
    return update.results()


class LeafwiseUpdate:
    """One update, to which gradients are given one by one, and which proceeds as far as they go."""

    def __init__(
        self,
        opt: optax.GradientTransformationExtraArgs,
        state: optax.OptState,
        params: optax.Params,
        extra_args: dict[str, Any],
    ) -> None:
        flat, self._treedef = jax.tree.flatten(params)

        def update(gradients: list[jax.Array]) -> Any:
            grads = jax.tree.unflatten(self._treedef, gradients)
            updates, new_state = opt.update(grads, state, params, **extra_args)
            new_state = optax.tree.cast_like(new_state, state)
            return jax.tree.leaves(optax.apply_updates(params, updates)), new_state

        # A gradient is like its parameter.
        self._jaxpr, consts, self._result = _jaxprs.trace_flat(update, flat)
        self._inputs: dict[Any, Any] = dict(zip(self._jaxpr.constvars, consts, strict=True))
        self._makers: dict[Any, Callable[[jax.Array], jax.Array]] = {}
        self._waiting = dict(enumerate(_gradients_needed(self._jaxpr)))
        self._given: set[int] = set()
        self._env: dict[Any, Any] = {}
        self._done: set[int] = set()  # equations
        self._last: list[Any] = []  # the results that were computed last

    def give(
        self,
        number: int,
        source: jax.Array,
        make: Callable[[jax.Array], jax.Array] = lambda gradient: gradient,
    ) -> None:
        """Give the gradient of leaf `number`, which is made from its source when it is needed."""
        var = self._jaxpr.invars[number]
        self._inputs[var], self._makers[var] = source, make
        self._given.add(number)
        ready = [i for i, needed in self._waiting.items() if needed and needed <= self._given]
        for i in ready:
            del self._waiting[i]
        self._compute([self._jaxpr.outvars[i] for i in ready])

    def results(self) -> tuple[optax.Params, optax.OptState]:
        """The new parameters and the new state, once all gradients are given."""
        self._compute([self._jaxpr.outvars[i] for i in self._waiting])
        values = _jaxprs.read(self._env, self._jaxpr.outvars)
        leaves, new_state = jax.tree.unflatten(jax.tree.structure(self._result), values)
        return jax.tree.unflatten(self._treedef, leaves), new_state

    def before(self, values: Any) -> Any:
        """`values`, to be there only when what is computed so far is."""
        # Left alone, XLA may make all gradients first, and update then.
        values, finished = jax.lax.optimization_barrier(  # type: ignore[no-untyped-call]
            (values, _jaxprs.read(self._env, self._last))
        )
        self._env.update(zip(self._last, finished, strict=True))
        return values

    def _compute(self, results: list[Any]) -> None:
        results = [var for var in results if not isinstance(var, _jaxprs.Literal)]
        if not results:
            return
        numbers, wanted = _jaxprs.needed(self._jaxpr, results)
        fresh = [var for var in self._inputs if var in wanted and var not in self._env]
        values = self.before([self._inputs[var] for var in fresh])
        for var, value in zip(fresh, values, strict=True):
            self._env[var] = self._makers[var](value) if var in self._makers else value
        for number in numbers:
            if number not in self._done:
                self._done.add(number)
                equation = self._jaxpr.eqns[number]
                values = _jaxprs.run(equation, _jaxprs.read(self._env, equation.invars))
                self._env.update(zip(equation.outvars, values, strict=True))
        self._last = results


def _gradients_needed(jaxpr: _jaxprs.Jaxpr) -> list[frozenset[int]]:
    """For every result the gradients that must be there; equations are computed whole."""
    labels = {var: frozenset([number]) for number, var in enumerate(jaxpr.invars)}

    def of(variables: Sequence[Any]) -> list[frozenset[int]]:
        none: frozenset[int] = frozenset()
        return [none if isinstance(v, _jaxprs.Literal) else labels.get(v, none) for v in variables]

    for equation in jaxpr.eqns:
        together = frozenset[int]().union(*of(equation.invars))
        labels.update(dict.fromkeys(equation.outvars, together))
    return of(jaxpr.outvars)
