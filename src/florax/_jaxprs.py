"""Traced programs: all that florax knows of jaxprs, and the one place where jax versions differ.

Only `jax.extend.core` is used, which is public. jax 0.10 keeps closed jaxprs in the parameters of
an equation and counts a scan's operands; jax 0.11 keeps open ones and a grouping of the operands.
"""

import weakref
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


def first_reads(jaxpr: Jaxpr) -> list[int]:
    """For every operand the number of the equation that first reads it."""
    found: dict[Any, int] = {}
    for number, equation in enumerate(jaxpr.eqns):
        for var in equation.invars:
            if not isinstance(var, Literal):
                found.setdefault(var, number)
    return [found.get(var, len(jaxpr.eqns)) for var in jaxpr.invars]


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


Labels: TypeAlias = frozenset[int]
Rule: TypeAlias = Callable[[Equation, list[Labels]], Sequence[Labels]]


def dependencies(
    jaxpr: Jaxpr, operands: Sequence[Labels], rule: Rule | None = None
) -> list[Labels]:
    """For every result the union of the labels of the operands that it depends on.

    `rule` gives the labels of an equation's results from those of its operands: `look_inside`, or
    `whole_equations` for programs whose equations are computed whole.
    """
    found = labels(jaxpr, operands, rule)
    return [_label(found, var) for var in jaxpr.outvars]


def labels(jaxpr: Jaxpr, operands: Sequence[Labels], rule: Rule | None = None) -> dict[Any, Labels]:
    """The same for every variable that depends on something."""
    rule = rule or look_inside
    found: dict[Any, Labels] = dict(zip(jaxpr.invars, operands, strict=True))
    for equation in jaxpr.eqns:
        results = rule(equation, [_label(found, var) for var in equation.invars])
        found.update(zip(equation.outvars, results, strict=True))
    return found


def _label(found: dict[Any, Labels], var: Any) -> Labels:
    return frozenset() if isinstance(var, Literal) else found.get(var, frozenset())


def whole_equations(equation: Equation, inputs: list[Labels]) -> Sequence[Labels]:
    """Every result depends on every operand."""
    return [frozenset[int]().union(*inputs)] * len(equation.outvars)


def look_inside(equation: Equation, inputs: list[Labels]) -> Sequence[Labels]:
    """A result depends on what it is computed from in the equation's inner program."""
    name = equation.primitive.name
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
    return whole_equations(equation, inputs)


def unchanged(equation: Equation, inputs: list[Labels]) -> Sequence[Labels]:
    """A result has the label of the operand that it is, unchanged; what is computed has none."""
    name = equation.primitive.name
    if name in JIT or name in CHECKPOINT:
        sources = forwarded(inner(equation)[0])
        return [frozenset[int]() if source is None else inputs[source] for source in sources]
    if name != "scan":
        return [frozenset()] * len(equation.outvars)
    parts = scan(equation, range(len(inputs)))
    first, last = len(parts.consts), len(parts.consts) + len(parts.carry)
    # What the loop carries must be handed on as itself, and what it collects be scanned over.
    own = [first + i if i < len(parts.carry) else None for i in range(len(equation.outvars))]
    pairs = zip(forwarded(parts.body), own, strict=True)
    stay = (s if s == i or (i is None and s is not None and s >= last) else None for s, i in pairs)
    return [frozenset() if source is None else inputs[source] for source in stay]


def forwarded(jaxpr: Jaxpr) -> list[int | None]:
    """For every result the operand that it is, unchanged; None for what is computed.

    Transformed modules (flax.nnx) return every parameter from every program they enter.
    """
    if jaxpr not in _FORWARDED:
        own = [frozenset([number]) for number in range(len(jaxpr.invars))]
        labels = dependencies(jaxpr, own, unchanged)
        _FORWARDED[jaxpr] = [next(iter(label), None) for label in labels]
    return _FORWARDED[jaxpr]


def wanted(jaxpr: Jaxpr, results: tuple[bool, ...]) -> frozenset[Any]:
    """The variables through which gradients reach those results that are chosen."""
    remembered = _WANTED.setdefault(jaxpr, {})
    if results not in remembered:
        found = {v for v, own in zip(jaxpr.outvars, results, strict=True) if own and _is_inexact(v)}
        for equation in reversed(jaxpr.eqns):
            chosen = tuple(var in found for var in equation.outvars)
            if any(chosen) and has_gradient(equation):
                pairs = zip(equation.invars, _wanted_of(equation, chosen), strict=True)
                found.update(var for var, own in pairs if own and _is_inexact(var))
        remembered[results] = frozenset(found)
    reached: frozenset[Any] = remembered[results]
    return reached


# Programs are nested, and called more than once: what is known of one is not found again.
_WANTED: weakref.WeakKeyDictionary[Jaxpr, dict[Any, Any]] = weakref.WeakKeyDictionary()
_FORWARDED: weakref.WeakKeyDictionary[Jaxpr, list[int | None]] = weakref.WeakKeyDictionary()


def _is_inexact(var: Any) -> bool:
    own = getattr(var.aval, "dtype", jnp.int32)
    return not isinstance(var, Literal) and jnp.issubdtype(own, jnp.inexact)


def _wanted_of(equation: Equation, results: tuple[bool, ...]) -> Sequence[bool]:
    """Which operands of an equation pass gradients to chosen results."""
    name = equation.primitive.name
    if name in JIT or name in CHECKPOINT:
        return _wanted_operands(inner(equation)[0], results)
    if name == "optimization_barrier":
        return results
    if name == "cond":
        jaxprs = [opened(branch)[0] for branch in equation.params["branches"]]
        own = [_wanted_operands(jaxpr, results) for jaxpr in jaxprs]
        return [False, *map(any, zip(*own, strict=True))]
    if name == "scan":
        body = scan(equation, equation.invars).body
        return _wanted_operands(body, wanted_of_body(equation, results))
    return [True] * len(equation.invars)


def _wanted_operands(jaxpr: Jaxpr, results: tuple[bool, ...]) -> list[bool]:
    found = wanted(jaxpr, results)
    return [var in found for var in jaxpr.invars]


def wanted_of_body(equation: Equation, results: tuple[bool, ...]) -> tuple[bool, ...]:
    """Which results of a scan's body pass gradients to chosen results of the scan."""
    parts = scan(equation, equation.invars)
    first, count = len(parts.consts), len(parts.carry)
    while True:
        carried = _wanted_operands(parts.body, results)[first : first + count]
        grown = (*(a or b for a, b in zip(results, carried, strict=False)), *results[count:])
        if grown == results:
            return results
        results = grown


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
