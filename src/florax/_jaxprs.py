"""Traced programs: all that florax knows of jaxprs, and the one place where jax versions differ.

Only `jax.extend.core` is used, which is public. jax 0.10 keeps closed jaxprs in the parameters of
an equation and counts a scan's operands; jax 0.11 keeps open ones and a grouping of the operands.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core, source_info_util

Jaxpr = core.Jaxpr
Equation = core.JaxprEqn
Literal = core.Literal

# Equations that run one inner program once, on their own operands.
JIT = ("jit", "pjit", "closed_call")
CHECKPOINT = ("checkpoint", "remat", "remat2")


def trace(function: Callable[..., Any], *args: Any) -> tuple[Jaxpr, Sequence[Any], Any]:
    """The program of `function` on the leaves of `args`: jaxpr, constants, shapes of the result."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    return closed.jaxpr, closed.consts, shapes


def trace_flat(function: Callable[..., Any], *args: Any) -> tuple[Jaxpr, Sequence[Any], Any]:
    """As `trace`, with every jit inside inlined: its equations then stand one by one."""
    jaxpr, consts, shapes = trace(function, *args)
    leaves = jax.tree.leaves(args)
    flat, flat_consts, _ = trace(lambda *leaves: run_program(jaxpr, consts, leaves), *leaves)
    return flat, flat_consts, shapes


def run_program(jaxpr: Jaxpr, consts: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Run a program equation by equation, with every jit inside inlined."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, values, strict=True))
    for equation in jaxpr.eqns:
        operands = read(env, equation.invars)
        if equation.primitive.name in JIT:
            results = run_program(*inner(equation), operands)
        else:
            results = run(equation, operands)
        env.update(zip(equation.outvars, results, strict=True))
    return read(env, jaxpr.outvars)


def abstractly(function: Callable[..., None], *args: Any) -> None:
    """Call `function` with abstract arrays in the place of the arrays, or shapes, in `args`."""
    flat, treedef = jax.tree.flatten(args)
    arrays = {i: x for i, x in enumerate(flat) if hasattr(x, "shape") and hasattr(x, "dtype")}

    def call(arrays: dict[int, jax.Array]) -> None:
        function(*jax.tree.unflatten(treedef, [arrays.get(i, x) for i, x in enumerate(flat)]))

    jax.eval_shape(call, arrays)


def read(env: dict[Any, Any], variables: Sequence[Any]) -> list[Any]:
    """The values of variables and literals."""
    return [var.val if isinstance(var, Literal) else env[var] for var in variables]


def opened(jaxpr: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """An equation's inner program and its constants."""
    if hasattr(jaxpr, "jaxpr"):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, ()


def inner(equation: Equation) -> tuple[Jaxpr, Sequence[Any]]:
    """The inner program of a jit or checkpoint."""
    params = equation.params
    return opened(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"])


def run(equation: Equation, values: Sequence[Any]) -> list[Any]:
    """Run one equation as it stands on the values of its operands."""
    # As a program of its own: that runs every primitive, custom rules included, by public API only.
    operands = {
        var: value
        for var, value in zip(equation.invars, values, strict=True)
        if not isinstance(var, Literal)
    }
    names = core.DebugInfo(
        "florax", equation.primitive.name, ("",) * len(operands), ("",) * len(equation.outvars)
    )
    program = core.Jaxpr((), list(operands), equation.outvars, [equation], equation.effects, names)
    function = core.jaxpr_as_fun(core.ClosedJaxpr(program, ()))  # type: ignore[attr-defined]
    return list(function(*operands.values()))


def has_gradient(equation: Equation) -> bool:
    """Whether any of its results can pass a gradient on to its operands."""
    if equation.primitive.name == "stop_gradient":
        return False
    dtypes = [getattr(var.aval, "dtype", jnp.int32) for var in equation.outvars]
    return any(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes)


class Scan(NamedTuple):
    """The operands of a scan, in their three groups, and its body."""

    consts: list[Any]
    carry: list[Any]
    xs: list[Any]
    body: Jaxpr
    body_consts: Sequence[Any]


def scan(equation: Equation, operands: Sequence[Any]) -> Scan:
    """Sort what stands for the operands of a scan."""
    params = equation.params
    body, body_consts = opened(params["jaxpr"])
    if "ft_in" in params:
        groups = params["ft_in"].update(list(operands)).unpack()
        consts, carry, xs = (list(group) for group in groups)
    else:
        first = params["num_consts"]
        last = first + params["num_carry"]
        consts, carry, xs = (
            list(group) for group in (operands[:first], operands[first:last], operands[last:])
        )
    return Scan(consts, carry, xs, body, body_consts)


def forwarded(jaxpr: Jaxpr) -> list[int | None]:
    """For every result the operand that it is, unchanged; None for what is computed.

    Transformed modules (flax.nnx) return every parameter from every program they enter.
    """
    origin: dict[Any, int] = {var: i for i, var in enumerate(jaxpr.invars)}

    def of(var: Any) -> int | None:
        return None if isinstance(var, Literal) else origin.get(var)

    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in JIT or name in CHECKPOINT:
            sources = forwarded(inner(equation)[0])
        elif name == "scan":
            sources = _forwarded_by_scan(equation)
        else:
            continue
        for var, source in zip(equation.outvars, sources, strict=True):
            number = None if source is None else of(equation.invars[source])
            if number is not None:
                origin[var] = number
    return [of(var) for var in jaxpr.outvars]


def _forwarded_by_scan(equation: Equation) -> list[int | None]:
    parts = scan(equation, range(len(equation.invars)))
    first, last = len(parts.consts), len(parts.consts) + len(parts.carry)
    sources: list[int | None] = []
    for result, source in enumerate(forwarded(parts.body)):
        is_carry = result < len(parts.carry)
        stays = source == first + result if is_carry else source is not None and source >= last
        sources.append(source if stays else None)
    return sources


def line(equation: Equation) -> str:
    """The line of the user's program that an equation comes from; empty inside JAX's functions."""
    return source_info_util.summarize(equation.source_info).rsplit("/", 1)[-1]


def order(jaxpr: Jaxpr) -> list[tuple[int, ...]]:
    """For every result when it is computed: positions that compare as the equations follow."""
    made: dict[Any, tuple[int, ...]] = {}
    for number, equation in enumerate(jaxpr.eqns):
        name = equation.primitive.name
        within: list[tuple[int, ...]] = [()] * len(equation.outvars)
        if name in JIT or name in CHECKPOINT:
            within = order(inner(equation)[0])
        for var, position in zip(equation.outvars, within, strict=True):
            made[var] = (number, *position)
    return [() if isinstance(var, Literal) else made.get(var, ()) for var in jaxpr.outvars]


def dependencies(jaxpr: Jaxpr, operands: Sequence[frozenset[int]]) -> list[frozenset[int]]:
    """For every result the union of the labels of the operands that it depends on."""
    none: frozenset[int] = frozenset()
    labels: dict[Any, frozenset[int]] = dict(zip(jaxpr.invars, operands, strict=True))

    def of(var: Any) -> frozenset[int]:
        return none if isinstance(var, Literal) else labels.get(var, none)

    for equation in jaxpr.eqns:
        inputs = [of(var) for var in equation.invars]
        results = _dependencies_of(equation, inputs)
        labels.update(zip(equation.outvars, results, strict=True))
    return [of(var) for var in jaxpr.outvars]


def _dependencies_of(equation: Equation, inputs: list[frozenset[int]]) -> Sequence[frozenset[int]]:
    name, count = equation.primitive.name, len(equation.outvars)
    if name in JIT or name in CHECKPOINT:
        return dependencies(inner(equation)[0], inputs)
    if name == "optimization_barrier":
        return inputs
    if name == "cond":
        index, *operands = inputs
        branches = [
            dependencies(opened(branch)[0], operands) for branch in equation.params["branches"]
        ]
        return [index.union(*results) for results in zip(*branches, strict=True)]
    if name == "scan":
        parts = scan(equation, inputs)
        carry = parts.carry
        while True:
            results = dependencies(parts.body, [*parts.consts, *carry, *parts.xs])
            grown = [old | new for old, new in zip(carry, results[: len(carry)], strict=True)]
            if grown == carry:
                return [*carry, *results[len(carry) :]]
            carry = grown
    # What is not looked into is taken to mix all that it is given.
    return [frozenset().union(*inputs)] * count


def needed(jaxpr: Jaxpr, results: Sequence[Any]) -> tuple[list[int], set[Any]]:
    """The equations that some of the results need, by number, and the variables they read."""
    wanted = {var for var in results if not isinstance(var, Literal)}
    numbers = []
    for number in reversed(range(len(jaxpr.eqns))):
        equation = jaxpr.eqns[number]
        if any(var in wanted for var in equation.outvars):
            numbers.append(number)
            wanted.update(var for var in equation.invars if not isinstance(var, Literal))
    return numbers[::-1], wanted
