"""What in a traced program depends on what: forward from operands, backward from results."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp

from florax import _jaxprs


def first_reads(jaxpr: _jaxprs.Jaxpr) -> list[int]:
    """For every operand the number of the equation that first reads it."""
    found: dict[Any, int] = {}
    for number, equation in enumerate(jaxpr.eqns):
        for var in equation.invars:
            if not isinstance(var, _jaxprs.Literal):
                found.setdefault(var, number)
    return [found.get(var, len(jaxpr.eqns)) for var in jaxpr.invars]


def order(jaxpr: _jaxprs.Jaxpr) -> list[tuple[int, ...]]:
    """For every result when it is computed: positions that compare as the equations follow."""
    made: dict[Any, tuple[int, ...]] = {}
    for number, equation in enumerate(jaxpr.eqns):
        name = equation.primitive.name
        within: list[tuple[int, ...]] = [()] * len(equation.outvars)
        if name in _jaxprs.JIT or name in _jaxprs.CHECKPOINT:
            within = order(_jaxprs.inner(equation)[0])
        for var, position in zip(equation.outvars, within, strict=True):
            made[var] = (number, *position)
    return [() if isinstance(var, _jaxprs.Literal) else made.get(var, ()) for var in jaxpr.outvars]


def scanned_once(jaxpr: _jaxprs.Jaxpr) -> list[bool]:
    """For every operand whether a single loop scans over it, and nothing else uses it."""
    return [count == 1 for count in _scanned(jaxpr)]


def _scanned(jaxpr: _jaxprs.Jaxpr) -> list[int]:
    """For every operand how many loops scan over it; of another use, two."""
    if jaxpr in _SCANNED:
        return _SCANNED[jaxpr]
    counts = [0] * len(jaxpr.invars)
    # Which operand a variable is, unchanged but in type and in the order of its axes.
    own: dict[Any, int] = {var: number for number, var in enumerate(jaxpr.invars)}
    for equation in jaxpr.eqns:
        read = [own.get(v) if not isinstance(v, _jaxprs.Literal) else None for v in equation.invars]
        name = equation.primitive.name
        within: Sequence[int] = [2] * len(read)
        sources: Sequence[int | None] = [None] * len(equation.outvars)
        if name in ("convert_element_type", "transpose", "reshard", "sharding_constraint"):
            within, sources = [0], [0]
        elif name in _jaxprs.JIT or name in _jaxprs.CHECKPOINT:
            inner, _ = _jaxprs.inner(equation)
            within, sources = _scanned(inner), forwarded(inner)
        elif name == "scan":
            parts = _jaxprs.scan(equation, range(len(read)))
            within = [1 if number in parts.xs else 2 for number in range(len(read))]
        for number, count in zip(read, within, strict=True):
            if number is not None:
                counts[number] += count
        for var, source in zip(equation.outvars, sources, strict=True):
            if source is not None and (operand := read[source]) is not None:
                own[var] = operand
    _SCANNED[jaxpr] = counts
    return counts


Labels: TypeAlias = frozenset[int]
Rule: TypeAlias = Callable[[_jaxprs.Equation, list[Labels]], Sequence[Labels]]


def dependencies(
    jaxpr: _jaxprs.Jaxpr, operands: Sequence[Labels], rule: Rule | None = None
) -> list[Labels]:
    """For every result the union of the labels of the operands that it depends on.

    `rule` gives the labels of an equation's results from those of its operands: `look_inside`, or
    `whole_equations` for programs whose equations are computed whole.
    """
    found = labels(jaxpr, operands, rule)
    return [_label(found, var) for var in jaxpr.outvars]


def labels(
    jaxpr: _jaxprs.Jaxpr, operands: Sequence[Labels], rule: Rule | None = None
) -> dict[Any, Labels]:
    """The same for every variable that depends on something."""
    rule = rule or look_inside
    found: dict[Any, Labels] = dict(zip(jaxpr.invars, operands, strict=True))
    for equation in jaxpr.eqns:
        results = rule(equation, [_label(found, var) for var in equation.invars])
        found.update(zip(equation.outvars, results, strict=True))
    return found


def _label(found: dict[Any, Labels], var: Any) -> Labels:
    return frozenset() if isinstance(var, _jaxprs.Literal) else found.get(var, frozenset())


def whole_equations(equation: _jaxprs.Equation, inputs: list[Labels]) -> Sequence[Labels]:
    """Every result depends on every operand."""
    return [frozenset[int]().union(*inputs)] * len(equation.outvars)


def look_inside(equation: _jaxprs.Equation, inputs: list[Labels]) -> Sequence[Labels]:
    """A result depends on what it is computed from in the equation's inner program."""
    name = equation.primitive.name
    if name in _jaxprs.JIT or name in _jaxprs.CHECKPOINT:
        return dependencies(_jaxprs.inner(equation)[0], inputs)
    if name == "optimization_barrier":
        return inputs
    if name == "cond":
        index, *operands = inputs
        branches = [
            dependencies(_jaxprs.opened(branch)[0], operands)
            for branch in equation.params["branches"]
        ]
        return [index.union(*results) for results in zip(*branches, strict=True)]
    if name == "scan":
        parts = _jaxprs.scan(equation, inputs)
        carry = parts.carry
        while True:
            results = dependencies(parts.body, [*parts.consts, *carry, *parts.xs])
            grown = [old | new for old, new in zip(carry, results[: len(carry)], strict=True)]
            if grown == carry:
                return [*carry, *results[len(carry) :]]
            carry = grown
    # What is not looked into is taken to mix all that it is given.
    return whole_equations(equation, inputs)


def unchanged(equation: _jaxprs.Equation, inputs: list[Labels]) -> Sequence[Labels]:
    """A result has the label of the operand that it is, unchanged; what is computed has none."""
    name = equation.primitive.name
    if name in _jaxprs.JIT or name in _jaxprs.CHECKPOINT:
        sources = forwarded(_jaxprs.inner(equation)[0])
        return [frozenset[int]() if source is None else inputs[source] for source in sources]
    if name != "scan":
        return [frozenset()] * len(equation.outvars)
    parts = _jaxprs.scan(equation, range(len(inputs)))
    first, last = len(parts.consts), len(parts.consts) + len(parts.carry)
    # What the loop carries must be handed on as itself, and what it collects be scanned over.
    own = [first + i if i < len(parts.carry) else None for i in range(len(equation.outvars))]
    pairs = zip(forwarded(parts.body), own, strict=True)
    stay = (s if s == i or (i is None and s is not None and s >= last) else None for s, i in pairs)
    return [frozenset() if source is None else inputs[source] for source in stay]


def forwarded(jaxpr: _jaxprs.Jaxpr) -> list[int | None]:
    """For every result the operand that it is, unchanged; None for what is computed.

    Transformed modules (flax.nnx) return every parameter from every program they enter.
    """
    if jaxpr not in _FORWARDED:
        own = [frozenset([number]) for number in range(len(jaxpr.invars))]
        labels = dependencies(jaxpr, own, unchanged)
        _FORWARDED[jaxpr] = [next(iter(label), None) for label in labels]
    return _FORWARDED[jaxpr]


def wanted(jaxpr: _jaxprs.Jaxpr, results: tuple[bool, ...]) -> frozenset[Any]:
    """The variables through which gradients reach those results that are chosen."""
    remembered = _WANTED.setdefault(jaxpr, {})
    if results not in remembered:
        found = {v for v, own in zip(jaxpr.outvars, results, strict=True) if own and _is_inexact(v)}
        for equation in reversed(jaxpr.eqns):
            chosen = tuple(var in found for var in equation.outvars)
            if any(chosen) and _jaxprs.has_gradient(equation):
                pairs = zip(equation.invars, _wanted_of(equation, chosen), strict=True)
                found.update(var for var, own in pairs if own and _is_inexact(var))
        remembered[results] = frozenset(found)
    reached: frozenset[Any] = remembered[results]
    return reached


# Programs are nested, and called more than once: what is known of one is not found again.
_WANTED: weakref.WeakKeyDictionary[_jaxprs.Jaxpr, dict[Any, Any]] = weakref.WeakKeyDictionary()
_SCANNED: weakref.WeakKeyDictionary[_jaxprs.Jaxpr, list[int]] = weakref.WeakKeyDictionary()
_FORWARDED: weakref.WeakKeyDictionary[_jaxprs.Jaxpr, list[int | None]] = weakref.WeakKeyDictionary()


def _is_inexact(var: Any) -> bool:
    own = getattr(var.aval, "dtype", jnp.int32)
    return not isinstance(var, _jaxprs.Literal) and jnp.issubdtype(own, jnp.inexact)


def _wanted_of(equation: _jaxprs.Equation, results: tuple[bool, ...]) -> Sequence[bool]:
    """Which operands of an equation pass gradients to chosen results."""
    name = equation.primitive.name
    if name in _jaxprs.JIT or name in _jaxprs.CHECKPOINT:
        return _wanted_operands(_jaxprs.inner(equation)[0], results)
    if name == "optimization_barrier":
        return results
    if name == "cond":
        jaxprs = [_jaxprs.opened(branch)[0] for branch in equation.params["branches"]]
        own = [_wanted_operands(jaxpr, results) for jaxpr in jaxprs]
        return [False, *map(any, zip(*own, strict=True))]
    if name == "scan":
        body = _jaxprs.scan(equation, equation.invars).body
        return _wanted_operands(body, wanted_of_body(equation, results))
    return [True] * len(equation.invars)


def _wanted_operands(jaxpr: _jaxprs.Jaxpr, results: tuple[bool, ...]) -> list[bool]:
    found = wanted(jaxpr, results)
    return [var in found for var in jaxpr.invars]


def wanted_of_body(equation: _jaxprs.Equation, results: tuple[bool, ...]) -> tuple[bool, ...]:
    """Which results of a scan's body pass gradients to chosen results of the scan."""
    parts = _jaxprs.scan(equation, equation.invars)
    first, count = len(parts.consts), len(parts.carry)
    while True:
        carried = _wanted_operands(parts.body, results)[first : first + count]
        grown = (*(a or b for a, b in zip(results, carried, strict=False)), *results[count:])
        if grown == results:
            return results
        results = grown


def needed(jaxpr: _jaxprs.Jaxpr, results: Sequence[Any]) -> tuple[list[int], set[Any]]:
    """The equations that some of the results need, by number, and the variables they read."""
    wanted = {var for var in results if not isinstance(var, _jaxprs.Literal)}
    numbers = []
    for number in reversed(range(len(jaxpr.eqns))):
        equation = jaxpr.eqns[number]
        if any(var in wanted for var in equation.outvars):
            numbers.append(number)
            wanted.update(var for var in equation.invars if not isinstance(var, _jaxprs.Literal))
    return numbers[::-1], wanted
