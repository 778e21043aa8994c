"""How florax reaches its transformations through the wrappers of Optax: by an extra argument.

Chains, masks, partitions and injected hyperparameters hand extra arguments on to what they wrap. So
`tx.update(..., florax=call)` reaches every FLORA transformation that sees what `tx` is given, and
nothing has to know what stands inside of what.
"""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from florax import _jaxprs, _sketches


class Look:
    """Asks which sketches are made of the very gradients that `tx` is given.

    A transformation that is asked notes what it sees, and does no more.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[Any, _sketches.Sketches, Any]] = []

    def note(self, updates: Any, sketches: _sketches.Sketches, owner: Any = None) -> Any:
        """Note what is seen; marked updates, which nothing behind takes for the gradients."""
        self.seen.append((updates, sketches, owner))
        return jax.tree.map(jax.lax.optimization_barrier, updates)


class Accumulate:
    """Asks for no more than to add the gradients: `florax.accumulate`."""


class Finish(NamedTuple):
    """Asks to end the cycle with mean gradients that are given by their names: `florax.finish`."""

    gradients: dict[str, jax.Array]


Call: TypeAlias = Look | Accumulate | Finish


class Seen(NamedTuple):
    """A FLORA transformation that is reached directly.

    Attributes:
      sketch: what it keeps.
      owner: the accumulation whose it is; None of a momentum.
      is_first: whether it sees the gradients before anything else does.
    """

    sketch: _sketches.Sketches
    owner: Any
    is_first: bool


def look(tx: Any, state: Any, params: Any) -> list[Seen]:
    """The FLORA transformations in `tx` that are reached directly, not from inside of a loop."""
    sketches = _sketches.find(state, _sketches.Sketches)
    call = Look()
    update = optax.with_extra_args_support(tx).update
    found: list[tuple[Seen, list[int]]] = []

    def probe(gradients: Any) -> Any:
        number_of = {id(leaf): number for number, leaf in enumerate(jax.tree.leaves(gradients))}
        updates: Any = ()
        try:
            updates, _ = update(gradients, state, params, florax=call, value=jnp.zeros([]))
        except Exception as error:  # what comes after them may need what is not known here
            if not call.seen:
                raise ValueError(
                    f"The state, a {type(state).__name__}, is no state of tx, or not of these "
                    f"parameters: {error}. Pass tx.init(params); and let all transformations in tx "
                    "take extra arguments that they do not know, as Optax asks for."
                ) from error
        for updates_seen, sketch, owner in call.seen:
            if any(sketch is own for own in sketches):
                numbers = [number_of.get(id(leaf), -1) for leaf in jax.tree.leaves(updates_seen)]
                found.append((Seen(sketch, owner, -1 not in numbers), numbers))
        return updates

    jaxpr, _, _ = _jaxprs.trace(probe, params)
    # Nothing but the marks may have read the gradients: no norm, nothing in a conditional.
    read = {
        id(var)
        for equation in jaxpr.eqns
        if equation.primitive.name != "optimization_barrier"
        for var in equation.invars
    }
    return [
        seen._replace(
            is_first=seen.is_first and not any(id(jaxpr.invars[n]) in read for n in numbers)
        )
        for seen, numbers in found
    ]
