"""An Optax update taken leaf by leaf, so that one leaf's full-size gradient is alive at a time.

Which outputs need which gradients is read from the traced update, not from a list of names: Adam's
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
    flat, treedef = jax.tree.flatten(params)

    def update(gradients: list[jax.Array]) -> Any:
        grads = jax.tree.unflatten(treedef, gradients)
        updates, new_state = opt.update(grads, state, params, **extra_args)
        new_state = optax.tree.cast_like(new_state, state)
        return jax.tree.leaves(optax.apply_updates(params, updates)), new_state

    shapes = [jax.eval_shape(make, source) for make, source in zip(gradients, sources, strict=True)]
    jaxpr, consts, result = _jaxprs.trace_flat(update, shapes)
    labels = [frozenset([number]) for number in range(len(flat))]
    depends = _jaxprs.dependencies(jaxpr, labels)
    inputs = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *sources), strict=True))
    makers = dict(zip(jaxpr.invars, gradients, strict=True))
    env: dict[Any, Any] = {}
    done: set[int] = set()
    last: list[Any] = []  # the results that were computed last

    def compute(results: list[Any]) -> None:
        numbers, wanted = _jaxprs.needed(jaxpr, results)
        fresh = [var for var in inputs if var in wanted and var not in env]
        # Not before the last leaf is finished: left alone, XLA may decompress them all first.
        values = jax.lax.optimization_barrier(  # type: ignore[no-untyped-call]
            [*(inputs[var] for var in fresh), *_jaxprs.read(env, last)]
        )
        env.update(zip((*fresh, *last), values, strict=True))
        env.update((var, makers[var](env[var])) for var in fresh if var in makers)
        for number in numbers:
            if number not in done:
                done.add(number)
                equation = jaxpr.eqns[number]
                values = _jaxprs.run(equation, _jaxprs.read(env, equation.invars))
                env.update(zip(equation.outvars, values, strict=True))

    for number in range(len(flat)):
        # With a leaf all else that needs no other gradient than those that were there already.
        seen = depends[number].union(*labels[: number + 1])
        ready = [i for i in range(len(flat), len(depends)) if depends[i] <= seen]
        numbers = [number, *(i for i in ready if depends[i])]
        results = [jaxpr.outvars[i] for i in numbers]
        compute(results)
        last = [var for var in results if not isinstance(var, _jaxprs.Literal)]
    compute(jaxpr.outvars)
    results = _jaxprs.read(env, jaxpr.outvars)
    leaves, new_state = jax.tree.unflatten(jax.tree.structure(result), results)
    return jax.tree.unflatten(treedef, leaves), new_state
