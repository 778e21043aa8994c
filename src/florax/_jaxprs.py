"""Traced programs: all that florax knows of jaxprs, and the one place where jax versions differ.

Only `jax.extend.core` is used, which is public. jax 0.10 keeps closed jaxprs in the parameters of
an equation and counts a scan's operands; jax 0.11 keeps open ones and a grouping of the operands.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import core, source_info_util

from florax import _meshes

Jaxpr = core.Jaxpr
Equation = core.JaxprEqn
Literal = core.Literal
Apply: TypeAlias = Callable[[Equation, list[Any]], Sequence[Any]]

# Equations that run one inner program once, on their own operands.
JIT = ("jit", "pjit", "closed_call")
CHECKPOINT = ("checkpoint", "remat", "remat2")


def trace(function: Callable[..., Any], *args: Any) -> tuple[Jaxpr, Sequence[Any], Any]:
    """The program of `function` on the leaves of `args`: jaxpr, constants, shapes of the result."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    return closed.jaxpr, closed.consts, shapes


def trace_flat(function: Callable[..., Any], *args: Any) -> tuple[Jaxpr, Sequence[Any], Any]:
    """As `trace`, with the jits inside inlined: their equations then stand one by one."""
    jaxpr, consts, shapes = trace(function, *args)
    return *flatten(jaxpr, consts, jax.tree.leaves(args)), shapes


def flatten(
    jaxpr: Jaxpr, consts: Sequence[Any], leaves: Sequence[Any], opens: Collection[int] = ()
) -> tuple[Jaxpr, Sequence[Any]]:
    """A program with the jits inside inlined, and the equations of the numbers in `opens`."""
    chosen = [jaxpr.eqns[number] for number in opens]

    def apply(equation: Equation, values: list[Any]) -> Sequence[Any]:
        if any(equation is own for own in chosen):
            return evaluate(*inner(equation), values, run_inlined)
        return run_inlined(equation, values)

    flat, flat_consts, _ = trace(lambda *leaves: evaluate(jaxpr, consts, leaves, apply), *leaves)
    return flat, flat_consts


def evaluate(
    jaxpr: Jaxpr, consts: Sequence[Any], values: Sequence[Any], apply: Apply | None = None
) -> list[Any]:
    """Evaluate a program: `apply` gives an equation's results from its operands (`run`)."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, values, strict=True))
    advance(env, jaxpr.eqns, apply)
    return read(env, jaxpr.outvars)


def advance(env: dict[Any, Any], equations: Iterable[Equation], apply: Apply | None = None) -> None:
    """Add to the values of variables those that equations compute."""
    apply = apply or run
    for equation in equations:
        results = apply(equation, read(env, equation.invars))
        env.update(zip(equation.outvars, results, strict=True))


def run_inlined(equation: Equation, values: Sequence[Any]) -> list[Any]:
    """Run one equation; of a jit that says nothing of shardings, those of its program."""
    said = (*equation.params.get("in_shardings", ()), *equation.params.get("out_shardings", ()))
    is_neutral = all(type(sharding).__name__ == "UnspecifiedValue" for sharding in said)
    if equation.primitive.name in JIT and is_neutral:
        return evaluate(*inner(equation), values, run_inlined)
    return run(equation, values)


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


def shape(var: Any) -> tuple[int, ...]:
    """Of a variable or a literal."""
    return tuple(var.aval.shape)


def dtype(var: Any) -> Any:
    """Of a variable or a literal."""
    return var.aval.dtype


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


def line(equation: Equation) -> str:
    """The line of the user's program that an equation comes from; empty inside JAX's functions."""
    return source_info_util.summarize(equation.source_info).rsplit("/", 1)[-1]


def mesh(equation: Equation) -> Any:
    """The mesh that the types of the results belong to, or None."""
    own = (getattr(var.aval, "sharding", None) for var in equation.outvars)
    return next((sharding.mesh for sharding in own if sharding is not None), None)


def shardings(equation: Equation, name: str) -> list[Any]:
    """Of the operands or results of a jit; None where they are not fixed."""
    count = len(equation.invars if name == "in_shardings" else equation.outvars)
    own = equation.params.get(name, (None,) * count)
    return [x if isinstance(x, jax.sharding.Sharding) else None for x in own]


def layouts(equation: Equation) -> list[Any]:
    """Of the operands and results of a jit; None where they are not fixed."""
    return [*equation.params.get("in_layouts", ()), *equation.params.get("out_layouts", ())]


# --- maps over an axis of layers

# Operations of which entry i of the result is made of entries i of the operands.
_ENTRY_WISE = """
    abs add and cbrt ceil clamp convert_element_type copy cos div eq erf erf_inv exp exp2 expm1
    floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not
    or pow reduce_precision rem round rsqrt select_n sign sin sqrt square stop_gradient sub tan
    tanh xor
""".split()  # noqa: SIM905


def mapped(
    equation: Equation, height: int, axes: Mapping[Any, int]
) -> list[tuple[Any, int | None]] | None:
    """Of an equation that maps over layers, its variables with their axis; None for no layers.

    None if it does not map over an axis of that height, or if nothing says over which: `axes` are
    those of variables that are known to be stacks.
    """
    name = equation.primitive.name
    shapes = [shape(var) for var in equation.invars]
    if name == "scan":
        parts = scan(equation, range(len(shapes)))
        if parts.carry or equation.params["length"] != height:
            return None
        operands = [0 if number in parts.xs else None for number in range(len(shapes))]
        return _variables(equation, operands, 0)
    (own, *_) = (shape(var) for var in equation.outvars)
    # Axis `order[i]` of an operand is axis i of the result.
    order = equation.params["permutation"] if name == "transpose" else range(len(own))
    if name not in ("transpose", "broadcast_in_dim", *_ENTRY_WISE):
        return None
    if name != "transpose" and not {*shapes} <= ({()} if name == "broadcast_in_dim" else {(), own}):
        return None
    stacks = [var for var in equation.invars if shape(var) and not isinstance(var, Literal)]
    known = {order.index(axes[var]) for var in stacks if var in axes}
    known |= {axes[var] for var in equation.outvars if var in axes}
    if len(known) != 1:
        return None
    (axis,) = known
    return _variables(equation, [order[axis] if operand else None for operand in shapes], axis)


def _variables(equation: Equation, operands: list[Any], axis: int) -> list[tuple[Any, int | None]]:
    pairs = [*zip(equation.invars, operands, strict=True), *((v, axis) for v in equation.outvars)]
    return [(var, own) for var, own in pairs if not isinstance(var, Literal)]


def spread(equations: Sequence[Equation], height: int, axes: dict[Any, int]) -> None:
    """Add to the layers' axes of variables what equations that map over layers say of others."""
    before = None
    while before != len(axes):
        before = len(axes)
        for equation in (*equations, *reversed(equations)):
            for var, axis in mapped(equation, height, axes) or ():
                if axis is not None:
                    axes.setdefault(var, axis)


def run_one_layer(equation: Equation, values: Sequence[Any], axis: int) -> Sequence[Any]:
    """Run an equation that is `mapped`, with the layers' axis of its results, on one layer."""
    name = equation.primitive.name
    if name == "scan":
        parts = scan(equation, values)
        operands = [*parts.consts, *parts.xs]
        return evaluate(parts.body, parts.body_consts, operands, run_inlined)
    if name == "transpose":
        order = list(equation.params["permutation"])
        gone = order.pop(axis)
        return [jnp.transpose(values[0], [own - (own > gone) for own in order])]
    if name == "reshard":
        sharding = equation.params["dst_sharding"]
        along = list(sharding.spec)
        del along[axis : axis + 1]
        return [_meshes.move(values[0], sharding.mesh, tuple(along))]
    if name == "broadcast_in_dim":
        (var,) = equation.outvars
        along = list(var.aval.sharding.spec)  # type: ignore[attr-defined]
        del along[axis : axis + 1]
        return [_meshes.divide(jnp.broadcast_to(values[0], layer_shape(var, axis)), tuple(along))]
    return run(equation, values)


def layer_shape(var: Any, axis: int) -> tuple[int, ...]:
    """Of one layer of a stack."""
    return shape(var)[:axis] + shape(var)[axis + 1 :]


def scans(equation: Equation) -> list[Equation]:
    """The scans that an equation is or has in its inner programs, the outer ones first."""
    values = equation.params.values()
    inside = [x for own in values for x in (own if isinstance(own, tuple | list) else [own])]
    own = [equation] if equation.primitive.name == "scan" else []
    return own + [scan for x in inside for e in getattr(x, "eqns", ()) for scan in scans(e)]


def describe(equation: Equation) -> str:
    """An operation for a message: its name, and the line that it comes from if it is known."""
    place = line(equation)
    return f"{equation.primitive.name} at {place}" if place else equation.primitive.name
