"""Parts of a traced loss, run forward, then backward: scans over layers, and what is around them.

A scan over layers keeps the input of every layer only. Backward it recomputes one layer at a time,
and its update takes the layer's gradients before the next layer has any.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from florax import _dependencies, _jaxprs, _meshes, _stacks, _updates

Env: TypeAlias = dict[Any, Any]


class Cotangents:
    """Of variables, the sum of what their uses gave so far."""

    def __init__(self, env: Env) -> None:
        self._env, self._sums = env, dict[Any, jax.Array]()

    def add(self, variables: Sequence[Any], cotangents: Sequence[jax.Array]) -> None:
        """Add to the cotangents of variables."""
        for var, own in zip(variables, cotangents, strict=True):
            if not isinstance(var, _jaxprs.Literal):
                old = self._sums.get(var)
                self._sums[var] = own if old is None else _add(old, own)

    def take(self, var: Any) -> jax.Array:
        """The cotangent of a variable to which nothing is added any more."""
        own = self._sums.pop(var, None)
        return _zeros(self._env[var]) if own is None else own

    def __contains__(self, var: Any) -> bool:
        """Whether any use gave something."""
        return var in self._sums

    def values(self) -> list[jax.Array]:
        """All of them."""
        return list(self._sums.values())

    def replace(self, values: Sequence[jax.Array]) -> None:
        """The same under other values."""
        self._sums = dict(zip(self._sums, values, strict=True))


class Plain:
    """Equations outside of the stacks of layers."""

    def __init__(
        self,
        equations: Sequence[_jaxprs.Equation],
        env: Env,
        active: Collection[Any],
        used: Collection[Any],
    ) -> None:
        """Evaluate them; `used` are variables that are read later, `active` have cotangents."""
        reads: dict[Any, None] = {}
        made: dict[Any, None] = {}
        for equation in equations:
            operands = [v for v in equation.invars if not isinstance(v, _jaxprs.Literal)]
            reads.update((v, None) for v in operands if v not in made)
            made.update((v, None) for v in equation.outvars)
        self.inputs = [v for v in reads if v in active]
        self.outputs = [v for v in made if v in used and v in active]
        others = [v for v in made if v in used and v not in active]

        def evaluate(values: list[jax.Array]) -> tuple[list[Any], list[Any]]:
            own = {**env, **dict(zip(self.inputs, values, strict=True))}
            _jaxprs.advance(own, equations)
            return _jaxprs.read(own, self.outputs), _jaxprs.read(own, others)

        values = [env[v] for v in self.inputs]
        results, self.pull, more = jax.vjp(evaluate, values, has_aux=True)
        env.update(zip((*self.outputs, *others), (*results, *more), strict=True))

    def backward(self, cotangents: Cotangents, update: _updates.Update) -> dict[int, jax.Array]:
        """Take the cotangents of the results back to the operands."""
        (own,) = self.pull([cotangents.take(var) for var in self.outputs])
        cotangents.add(self.inputs, own)
        return {}


class Weight(NamedTuple):
    """A stacked parameter.

    Attributes:
      number: of the parameter.
      axis: of its layers.
      casts: and transposes through which a scan reads it, with the layers' axis in their results.
    """

    number: int
    axis: int
    casts: Sequence[tuple[_jaxprs.Equation, int]]


class Layers:
    """A scan over layers."""

    def __init__(
        self,
        equation: _jaxprs.Equation,
        weights: dict[Any, Weight],
        leaves: Sequence[jax.Array],
        env: Env,
        active: Collection[Any],
        used: Collection[Any],
    ) -> None:
        """Run it forward; `weights` are those of `leaves` that it scans over, by variable."""
        self.weights = weights
        self.axes = dict(sorted((number, axis) for number, axis, _ in weights.values()))
        stacks = [leaves[number] for number in self.axes]
        self.length, self.reverse = equation.params["length"], equation.params["reverse"]
        self.operands = operands = _jaxprs.scan(equation, equation.invars)
        first, count = len(operands.consts), len(operands.carry)
        # What the loop carries unchanged is a constant of it, and is not kept layer by layer.
        sources = _dependencies.forwarded(operands.body)
        self.still = [sources[i] == first + i for i in range(count)]
        self.moving = [not stays for stays in self.still]
        self.const_vars = [*operands.consts, *_where(self.still, operands.carry)]
        self.carry_vars = _where(self.moving, operands.carry)
        self.data_vars = [v for v in operands.xs if v not in weights]
        self.carry_results = _where(self.moving, equation.outvars[:count])
        self.is_kept = [v in used for v in equation.outvars[count:]]
        self.kept = _where(self.is_kept, equation.outvars[count:])
        # The same values under other names.
        self.aliases = dict(
            zip(_where(self.still, equation.outvars[:count]), self.const_vars[first:], strict=True)
        )
        # Differentiated are the weights and what depends on parameters.
        self.const_on = [_reaches(v, active) for v in self.const_vars]
        self.carry_on = [is_inexact(v) for v in self.carry_vars]
        self.data_on = [_reaches(v, active) for v in self.data_vars]

        self.consts, carry, self.data = (
            _jaxprs.read(env, own) for own in (self.const_vars, self.carry_vars, self.data_vars)
        )

        def forward(carry: list[Any], xs: Any) -> Any:
            index, data = xs
            # Taken, not scanned over: so a stack along another axis is not transposed as a whole.
            own = _stacks.take(stacks, index, [*self.axes.values()])
            new, outputs = self.layer(self.consts, carry, own, data)
            return new, (carry, outputs)

        xs = (jnp.arange(self.length), self.data)
        last, (self.inputs, outputs) = jax.lax.scan(forward, carry, xs, reverse=self.reverse)
        env.update(zip((*self.carry_results, *self.kept), (*last, *outputs), strict=True))
        env.update(zip(self.aliases, _jaxprs.read(env, list(self.aliases.values())), strict=True))

    def layer(
        self, consts: list[Any], carry: list[Any], own: list[Any], data: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        """One layer: what it hands on, and what of its results is used."""
        fixed, moved, slices = iter(consts), iter(carry), iter(data)
        stacks = dict(zip(self.axes, own, strict=True))
        values = [next(fixed) for _ in self.operands.consts]
        values += [next(fixed) if stays else next(moved) for stays in self.still]
        for var in self.operands.xs:
            if var not in self.weights:
                values.append(next(slices))
                continue
            value = stacks[self.weights[var].number]
            for cast, axis in self.weights[var].casts:
                (value,) = _jaxprs.run_one_layer(cast, [value], axis)
            values.append(value)
        body, body_consts = self.operands.body, self.operands.body_consts
        outputs = _jaxprs.evaluate(body, body_consts, values, _jaxprs.run_inlined)
        count = len(self.still)
        return _where(self.moving, outputs[:count]), _where(self.is_kept, outputs[count:])

    def backward(self, cotangents: Cotangents, update: _updates.Update) -> dict[int, jax.Array]:
        """Update the layers from the last to the first; the values that are replaced."""
        layers = update.layers(self.axes, self.length)
        d_kept = [cotangents.take(v) if is_inexact(v) else None for v in self.kept]

        def give(
            index: jax.Array, update: _updates.Update, own: list[jax.Array], carry: Any
        ) -> Any:
            d_carry, d_consts, d_data = carry
            own_carry, own_data, d_outputs = _stacks.take((self.inputs, self.data, d_kept), index)

            def differentiated(
                on_consts: list[Any], on_carry: list[Any], own: list[Any], on_data: list[Any]
            ) -> Any:
                new, outputs = self.layer(
                    _mix(self.const_on, on_consts, self.consts),
                    _mix(self.carry_on, on_carry, own_carry),
                    own,
                    _mix(self.data_on, on_data, own_data),
                )
                pairs = zip(outputs, d_outputs, strict=True)
                return _where(self.carry_on, new), [x for x, d in pairs if d is not None]

            _, pull = jax.vjp(
                differentiated,
                _where(self.const_on, self.consts),
                _where(self.carry_on, own_carry),
                own,
                _where(self.data_on, own_data),
            )
            incoming = (d_carry, [d for d in d_outputs if d is not None])
            jaxpr, _, _ = _jaxprs.trace(lambda incoming: pull(incoming)[2], incoming)
            order = _dependencies.order(jaxpr)
            g_consts, d_carry, grads, g_data = pull(incoming)
            # As the backward pass yields them, so that none has to wait for another.
            for number in sorted(range(len(grads)), key=lambda number: order[number]):
                update.give(number, grads[number])
            d_consts = [*map(_add, d_consts, g_consts)]
            return d_carry, d_consts, _stacks.put(d_data, g_data, index)

        start = (
            [cotangents.take(v) for v in _where(self.carry_on, self.carry_results)],
            [*map(_zeros, _where(self.const_on, self.consts))],
            [*map(_zeros, _where(self.data_on, self.data))],
        )
        replaced, (d_carry, d_consts, d_data) = update.run_layers(
            layers, give, start, reverse=not self.reverse
        )
        cotangents.add(_where(self.carry_on, self.carry_vars), d_carry)
        cotangents.add(_where(self.const_on, self.const_vars), d_consts)
        cotangents.add(_where(self.data_on, self.data_vars), d_data)
        for alias, var in self.aliases.items():
            if alias in cotangents:
                cotangents.add([var], [cotangents.take(alias)])
        return replaced


Segment: TypeAlias = Plain | Layers


def is_inexact(var: Any) -> bool:
    """Whether a variable is of a dtype that has cotangents."""
    return jnp.issubdtype(var.aval.dtype, jnp.inexact)


def _add(x: jax.Array, y: jax.Array) -> jax.Array:
    with _meshes.in_use(x):
        return x + y


def _zeros(like: jax.Array) -> jax.Array:
    with _meshes.in_use(like):
        return jnp.zeros_like(like)


def _where(chosen: Sequence[bool], values: Sequence[Any]) -> list[Any]:
    return [value for value, choose in zip(values, chosen, strict=True) if choose]


def _mix(chosen: Sequence[bool], values: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """`others` with the chosen ones replaced by `values`, in their order."""
    new = iter(values)
    return [next(new) if choose else other for choose, other in zip(chosen, others, strict=True)]


def _reaches(var: Any, active: Collection[Any]) -> bool:
    return not isinstance(var, _jaxprs.Literal) and var in active
