"""Layer by layer: every layer is updated as its gradient appears, and no other is alive.

The traced loss is cut at its scans over stacked parameters. Forward, each scan keeps the input of
every layer; backward, a loop over the layers in reverse recomputes one layer, takes its gradient,
runs the optimizer on that layer's slice of parameters and state, and writes both back in place.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from florax import _accumulate, _jaxprs, _leafwise, _leaves, _meshes, _per_layer, _steps


def layerwise_value_and_update(
    loss_fn: Callable[..., Any], tx: optax.GradientTransformation
) -> tuple[Callable[..., Any], Callable[..., tuple[jax.Array, optax.Params, Any]]]:
    """Update layer by layer, so that one layer's gradient is alive at a time.

    For a model whose layers are stacked and scanned: parameters with a leading axis of layers that
    are the scanned inputs of a `jax.lax.scan` (`flax.nnx.scan`, `flax.linen.scan`). Nothing is
    asked of the model; the scans are found in the traced loss, several if there are (encoder and
    decoder). Only the inputs of layers are kept, and the layers recomputed, as under
    `jax.checkpoint`. Embeddings, heads and what else is no part of a stack are updated once, at the
    end. Every layer is a block of its own to `tx`, as in `per_layer`.

    With `tx = flora_accumulate(...)` a step is a whole cycle: gradients are accumulated over the
    micro-batches as they are born, compressed, and the base optimizer then runs layer by layer. The
    backward pass is then the loss's own: wrap its layers in `jax.checkpoint` to keep only their
    inputs.

    Args:
      loss_fn: `loss_fn(params, *args)`, a real scalar.
      tx: an Optax transformation that updates every leaf by itself: Adam, Adafactor, Lion, SGD,
        `flora`, and chains of them. One that mixes leaves, as clipping by the global norm, cannot
        run before all gradients are known, and is refused.

    Returns:
      A pair of functions. `init(params, *args) -> state`, for which shapes suffice
      (`jax.eval_shape`): a `PerLayerState`, or a `FloraAccumulateState` around one.
      `step(params, state, *args) -> (loss, params, state)`; jit it and donate params and state.
      For `flora_accumulate`, arrays in `args` have a leading axis of micro-batches in both.

    Raises:
      ValueError: no stacked parameter is scanned over, or `tx` mixes leaves; the message says what
        was found.

    >>> import florax, jax, jax.numpy as jnp, optax
    >>> def loss_fn(params, x):
    ...     layer = lambda x, w: (jnp.tanh(x @ w), None)
    ...     x, _ = jax.lax.scan(layer, x @ params["embed"], params["layers"])
    ...     return jnp.mean(x**2)
    >>> params = {"embed": jnp.ones((4, 8)) / 4, "layers": jnp.stack([jnp.eye(8)] * 6)}
    >>> init, step = florax.layerwise_value_and_update(loss_fn, optax.adam(1e-2))
    >>> x = jnp.ones((16, 4))
    >>> state = init(params, x)
    >>> step = jax.jit(step, donate_argnums=(0, 1))
    >>> for _ in range(3):
    ...     loss, params, state = step(params, state, x)
    ...     print(f"{loss:.3f}")
    0.193
    0.105
    0.048

    Source: the fused update of LOMO (Lv et al., 2023, arXiv:2306.09782), which the paper combines
    with FLORA in its Appendix C; here for any leaf-wise transformation and with accumulation.
    """
    if isinstance(getattr(tx, "update", None), _accumulate.Update):
        return _accumulating(loss_fn, tx)
    opt = optax.with_extra_args_support(tx)
    if isinstance(opt.update, _per_layer.Update):  # as every transformation is here
        opt = opt.update.opt

    def init(params: optax.Params, *args: Any) -> _per_layer.PerLayerState:
        return _per_layer.init(opt, params, _checked_stacks(loss_fn, opt, params, args))

    def step(
        params: optax.Params, state: _per_layer.PerLayerState, *args: Any
    ) -> tuple[jax.Array, optax.Params, _per_layer.PerLayerState]:
        program = _find(loss_fn, params, args)
        if state.stacks != program.stacks:
            raise ValueError(
                f"The state was made for other stacks of layers, {state.stacks}, than the loss has "
                f"now, {program.stacks}. Call init with this loss and these parameters."
            )
        return _Step(program, opt, params, state).run()

    return init, step


def _accumulating(
    loss_fn: Callable[..., Any], tx: optax.GradientTransformation
) -> tuple[Callable[..., Any], Callable[..., tuple[jax.Array, optax.Params, Any]]]:
    base = tx.update.opt
    opt = base.update.opt if isinstance(base.update, _per_layer.Update) else base

    def layered(
        params: optax.Params, args: tuple[Any, ...]
    ) -> optax.GradientTransformationExtraArgs:
        def loss_of_first(params: optax.Params, *args: Any) -> Any:
            return loss_fn(params, *jax.tree.map(lambda x: x[0], args))

        stacks = _checked_stacks(loss_of_first, opt, params, args)
        base = optax.GradientTransformationExtraArgs(
            lambda params: _per_layer.init(opt, params, stacks), _per_layer.Update(opt)
        )
        return optax.GradientTransformationExtraArgs(
            dataclasses.replace(tx.init, opt=base), dataclasses.replace(tx.update, opt=base)
        )

    def init(params: optax.Params, *args: Any) -> _accumulate.FloraAccumulateState:
        state: _accumulate.FloraAccumulateState = layered(params, args).init(params)
        return state

    def step(
        params: optax.Params, state: _accumulate.FloraAccumulateState, *args: Any
    ) -> tuple[jax.Array, optax.Params, _accumulate.FloraAccumulateState]:
        return _steps.value_and_update(loss_fn, layered(params, args))(params, state, *args)

    return init, step


def _checked_stacks(
    loss_fn: Callable[..., Any],
    opt: optax.GradientTransformationExtraArgs,
    params: optax.Params,
    args: tuple[Any, ...],
) -> _per_layer.Stacks:
    """The stacks of layers that the loss scans over, after checking that `opt` can be split."""
    found: list[_per_layer.Stacks] = []
    _jaxprs.abstractly(lambda p, *a: found.append(_find(loss_fn, p, a).stacks), params, *args)
    (stacks,) = found
    _check_leafwise(opt, params, stacks)
    return stacks


class _Program(NamedTuple):
    """A loss cut at its scans over stacked parameters.

    Attributes:
      jaxpr: of the loss as a function of the parameters' leaves.
      consts: its constants.
      segments: ranges of its equations; those that are one such scan have a number of its stack.
      weights: per stack, by variable of the scan's stacked input, the parameter's number and the
        casts between them.
      casts: the numbers of the equations that only cast a stacked parameter: done layer by layer.
      stacks: which parameters are in which stack.
    """

    jaxpr: _jaxprs.Jaxpr
    consts: Sequence[Any]
    segments: list[tuple[range, int | None]]
    weights: list[dict[Any, tuple[int, list[_jaxprs.Equation]]]]
    casts: set[int]
    stacks: _per_layer.Stacks


def _find(loss_fn: Callable[..., Any], params: optax.Params, args: tuple[Any, ...]) -> _Program:
    """Trace the loss and find its scans over stacked parameters."""
    jaxpr, consts, result = _jaxprs.trace_flat(lambda params: loss_fn(params, *args), params)
    if not hasattr(result, "shape") or result.shape:
        raise TypeError(f"The loss must be a real scalar, got {result}. Return one number.")
    uses: dict[Any, list[int]] = {}
    for number, equation in enumerate(jaxpr.eqns):
        for var in equation.invars:
            if not isinstance(var, _jaxprs.Literal):
                uses.setdefault(var, []).append(number)
    made = {var: equation for equation in jaxpr.eqns for var in equation.outvars}
    numbers = {var: number for number, var in enumerate(jaxpr.invars)}

    def parameter(var: Any) -> tuple[int, list[_jaxprs.Equation]] | None:
        """The parameter that a variable is a cast of, if it has no other use."""
        casts: list[_jaxprs.Equation] = []
        while not isinstance(var, _jaxprs.Literal) and len(uses.get(var, ())) == 1:
            if var in jaxpr.outvars:
                break
            if var in numbers:
                return numbers[var], casts[::-1]
            if var not in made or made[var].primitive.name != "convert_element_type":
                break
            casts.append(made[var])
            var = made[var].invars[0]
        return None

    of_leaves: list[int | None] = [None] * len(jaxpr.invars)
    weights: list[dict[Any, tuple[int, list[_jaxprs.Equation]]]] = []
    heights: list[int] = []
    segments: list[tuple[range, int | None]] = []
    start, scans = 0, 0
    for number, equation in enumerate(jaxpr.eqns):
        if equation.primitive.name != "scan":
            continue
        scans += 1
        own = {
            var: found
            for var in _jaxprs.scan(equation, equation.invars).xs
            if (found := parameter(var)) is not None
        }
        if own:
            for leaf, _ in own.values():
                of_leaves[leaf] = len(weights)
            segments += [(range(start, number), None), (range(number, number + 1), len(weights))]
            start = number + 1
            weights.append(own)
            heights.append(equation.params["length"])
    segments.append((range(start, len(jaxpr.eqns)), None))
    if not weights:
        raise ValueError(
            "layerwise_value_and_update looks for a jax.lax.scan at the top level of the loss (jit "
            "may be around it, no other transformation) that takes stacked parameters as scanned "
            f"inputs and is their only use; of the {scans} scans it found none does. Scan over the "
            "layers of the model, or use value_and_update."
        )
    stacks = _per_layer.Stacks(tuple(of_leaves), tuple(heights))
    cast = {id(equation) for own in weights for _, chain in own.values() for equation in chain}
    casts = {number for number, equation in enumerate(jaxpr.eqns) if id(equation) in cast}
    return _Program(jaxpr, consts, segments, weights, casts, stacks)


def _check_leafwise(
    opt: optax.GradientTransformationExtraArgs, params: optax.Params, stacks: _per_layer.Stacks
) -> None:
    """Raise if the update of a leaf, now or later, depends on another leaf's gradient."""
    paths = [_leaves.name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for stack in (None, *range(len(stacks.heights))):
        own = [path for path, mine in zip(paths, stacks.of_leaves, strict=True) if mine == stack]
        part = stacks.select(params, stack)
        if stack is not None:
            part = jax.eval_shape(lambda part: jax.tree.map(lambda x: x[0], part), part)
        mixed = _mixed(opt, part)
        if mixed is not None:
            first, second = (own[number] for number in mixed)
            raise ValueError(
                f"tx mixes leaves: the update of {first} depends on the gradient of {second}, "
                "which may not exist when it is updated. Leave out what needs all gradients, such "
                "as clipping by the global norm (optax.clip_by_block_rms clips by leaf), or use "
                "value_and_update."
            )


def _mixed(opt: optax.GradientTransformationExtraArgs, params: Any) -> tuple[int, int] | None:
    """Two leaves, by number, of which the first one's update depends on the second's gradient."""
    state = jax.eval_shape(opt.init, params)
    jaxpr, _, _ = _jaxprs.trace_flat(lambda g, s, p: opt.update(g, s, p), params, state, params)
    count = len(jax.tree.leaves(params))
    own = [frozenset([number]) for number in range(count)]
    # What a state holds of a gradient reaches the updates later on.
    held = [frozenset[int]()] * len(jax.tree.leaves(state))
    while True:
        depends = _jaxprs.dependencies(jaxpr, [*own, *held, *own])
        grown = [old | new for old, new in zip(held, depends[count:], strict=True)]
        if grown == held:
            break
        held = grown
    for number, labels in enumerate(depends[:count]):
        for other in sorted(labels - {number}):
            return number, other
    return None


class _Step:
    """One step: the segments of the program forward, then backward with updates.

    Attributes:
      env: values of variables.
      active: the variables that depend on parameters, and so have cotangents.
      cotangents: of active variables, the sum of what their uses gave so far.
    """

    def __init__(
        self,
        program: _Program,
        opt: optax.GradientTransformationExtraArgs,
        params: optax.Params,
        state: _per_layer.PerLayerState,
    ) -> None:
        self.program, self.opt, self.params, self.state = program, opt, params, state
        jaxpr = program.jaxpr
        self.leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(params)]
        self.env: dict[Any, Any] = dict(zip(jaxpr.constvars, program.consts, strict=True))
        self.active: set[Any] = set()
        self.cotangents: dict[Any, jax.Array] = {}
        for var, leaf, stack in zip(
            jaxpr.invars, self.leaves, program.stacks.of_leaves, strict=True
        ):
            if stack is None:
                self.env[var] = leaf
                self.active.add(var)

    def run(self) -> tuple[jax.Array, optax.Params, _per_layer.PerLayerState]:
        jaxpr, stacks = self.program.jaxpr, self.program.stacks
        backward: list[Callable[[], Any]] = []
        for numbers, stack in self.program.segments:
            segment = self.plain(numbers) if stack is None else self.layers(numbers[0], stack)
            backward.append(segment)
        (loss,) = _jaxprs.read(self.env, jaxpr.outvars)
        self.cotangents[jaxpr.outvars[0]] = jnp.ones_like(loss)

        parts: dict[int | None, Any] = {}
        layer_states: dict[int, optax.OptState] = {}
        rest = _leafwise.LeafwiseUpdate(
            self.opt, self.state.rest, stacks.select(self.params, None), {}
        )
        rest_vars = [
            var for var, own in zip(jaxpr.invars, stacks.of_leaves, strict=True) if own is None
        ]
        waiting = dict(enumerate(rest_vars))
        for number, (_, stack) in reversed(list(enumerate(self.program.segments))):
            updated = backward[number]()
            if stack is not None:
                parts[stack], layer_states[stack] = updated
            # What no earlier segment reads has its whole gradient: updated now, not kept.
            start = self.program.segments[number][0].start
            read = [var for equation in jaxpr.eqns[:start] for var in equation.invars]
            for leaf in [leaf for leaf, var in waiting.items() if all(var is not v for v in read)]:
                rest.give(leaf, self.cotangent(waiting.pop(leaf)))
            values = rest.before(list(self.cotangents.values()))
            self.cotangents = dict(zip(self.cotangents, values, strict=True))
        parts[None], rest_state = rest.results()
        layers = tuple(layer_states[stack] for stack in range(len(stacks.heights)))
        params = stacks.merge(jax.tree.structure(self.params), parts)
        return loss, params, _per_layer.PerLayerState(layers, rest_state, stacks)

    def cotangent(self, var: Any) -> jax.Array:
        """The cotangent of a variable to which nothing is added any more."""
        own = self.cotangents.pop(var, None)
        return jnp.zeros_like(self.env[var]) if own is None else own

    def give(self, variables: Sequence[Any], cotangents: Sequence[jax.Array]) -> None:
        """Add to the cotangents of variables."""
        for var, own in zip(variables, cotangents, strict=True):
            if isinstance(var, _jaxprs.Literal):
                continue
            old = self.cotangents.get(var)
            self.cotangents[var] = own if old is None else old + own

    def used_from(self, number: int) -> set[Any]:
        """The variables that the equations from `number` on read, and the results."""
        jaxpr = self.program.jaxpr
        operands = [var for equation in jaxpr.eqns[number:] for var in equation.invars]
        return {v for v in (*jaxpr.outvars, *operands) if not isinstance(v, _jaxprs.Literal)}

    def plain(self, numbers: range) -> Callable[[], None]:
        """Evaluate equations outside of the stacks; gives what takes their cotangents back."""
        equations = [
            self.program.jaxpr.eqns[number]
            for number in numbers
            if number not in self.program.casts
        ]
        reads: dict[Any, None] = {}
        made: dict[Any, None] = {}
        active = set(self.active)
        for equation in equations:
            operands = [v for v in equation.invars if not isinstance(v, _jaxprs.Literal)]
            reads.update((v, None) for v in operands if v not in made)
            made.update((v, None) for v in equation.outvars)
            if any(v in active for v in operands):
                active.update(filter(_is_inexact, equation.outvars))
        used = self.used_from(numbers.stop)
        inputs = [v for v in reads if v in active]
        outputs = [v for v in made if v in used and v in active]
        others = [v for v in made if v in used and v not in active]

        def evaluate(values: list[jax.Array]) -> tuple[list[Any], list[Any]]:
            env = {**self.env, **dict(zip(inputs, values, strict=True))}
            for equation in equations:
                results = _jaxprs.run(equation, _jaxprs.read(env, equation.invars))
                env.update(zip(equation.outvars, results, strict=True))
            return _jaxprs.read(env, outputs), _jaxprs.read(env, others)

        values = [self.env[v] for v in inputs]
        results, pull, more = jax.vjp(evaluate, values, has_aux=True)
        self.env.update(zip((*outputs, *others), (*results, *more), strict=True))
        self.active.update(outputs)

        def backward() -> None:
            (cotangents,) = pull([self.cotangent(var) for var in outputs])
            self.give(inputs, cotangents)

        return backward

    def layers(self, number: int, stack: int) -> Callable[[], tuple[Any, optax.OptState]]:
        """Run a scan over layers; gives what runs it backward and updates the layers."""
        equation = self.program.jaxpr.eqns[number]
        weights = self.program.weights[stack]
        length, reverse = equation.params["length"], equation.params["reverse"]
        operands = _jaxprs.scan(equation, equation.invars)
        first, count = len(operands.consts), len(operands.carry)
        # What the loop carries unchanged is a constant of it, and is not kept layer by layer.
        sources = _jaxprs.forwarded(operands.body)
        still = [sources[i] == first + i for i in range(count)]
        const_vars = [*operands.consts, *_where(still, operands.carry)]
        moving = [not stays for stays in still]
        carry_vars = _where(moving, operands.carry)
        carry_results = _where(moving, equation.outvars[:count])
        data_vars = [v for v in operands.xs if v not in weights]
        used = self.used_from(number + 1)
        is_kept = [v in used for v in equation.outvars[count:]]
        kept = _where(is_kept, equation.outvars[count:])
        consts, carry, data = (
            _jaxprs.read(self.env, own) for own in (const_vars, carry_vars, data_vars)
        )
        # In flattening order, as the optimizer's tree has them.
        members = sorted(leaf for leaf, _ in weights.values())

        def layer(consts: list[Any], carry: list[Any], own: list[Any], data: list[Any]) -> Any:
            fixed, moved, slices = iter(consts), iter(carry), iter(data)
            values = [next(fixed) for _ in range(first)]
            values += [next(fixed) if stays else next(moved) for stays in still]
            for var in operands.xs:
                if var not in weights:
                    values.append(next(slices))
                    continue
                leaf, casts = weights[var]
                value = own[members.index(leaf)]
                for cast in casts:
                    (value,) = _jaxprs.run(cast, [value])
                values.append(value)
            outputs = _jaxprs.run_program(operands.body, operands.body_consts, values)
            return _where(moving, outputs[:count]), _where(is_kept, outputs[count:])

        def forward(carry: list[Any], xs: Any) -> Any:
            new, outputs = layer(consts, carry, *xs)
            return new, (carry, outputs)

        own_stacks = [self.leaves[leaf] for leaf in members]
        last, (inputs, outputs) = jax.lax.scan(
            forward, carry, (own_stacks, data), length=length, reverse=reverse
        )
        self.env.update(zip((*carry_results, *kept), (*last, *outputs), strict=True))
        self.active.update(filter(_is_inexact, (*carry_results, *kept)))
        for var, stays, value in zip(equation.outvars, still, operands.carry, strict=False):
            if stays:  # the same value under another name
                (self.env[var],) = _jaxprs.read(self.env, [value])
                self.active.update([var] if _reaches(value, self.active) else [])

        def backward() -> tuple[Any, optax.OptState]:
            # Differentiated are the weights and what depends on parameters.
            const_on = [_reaches(v, self.active) for v in const_vars]
            carry_on = [_is_inexact(v) for v in carry_vars]
            data_on = [_reaches(v, self.active) for v in data_vars]
            d_kept = [self.cotangent(v) if _is_inexact(v) else None for v in kept]
            start = (
                own_stacks,
                self.state.layers[stack],
                [self.cotangent(v) for v in _where(carry_on, carry_results)],
                [jnp.zeros_like(x) for x in _where(const_on, consts)],
                [jnp.zeros_like(x) for x in _where(data_on, data)],
            )
            treedef = jax.tree.structure(self.program.stacks.select(self.params, stack))

            def body(step: jax.Array, loop: Any) -> Any:
                own_stacks, states, d_carry, d_consts, d_data = loop
                index = step if reverse else length - 1 - step
                own, own_state, own_carry, own_data, d_outputs = jax.tree.map(
                    lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False),
                    (own_stacks, states, inputs, data, d_kept),
                )

                def differentiated(
                    on_consts: list[Any], on_carry: list[Any], own: list[Any], on_data: list[Any]
                ) -> Any:
                    new, outputs = layer(
                        _mix(const_on, on_consts, consts),
                        _mix(carry_on, on_carry, own_carry),
                        own,
                        _mix(data_on, on_data, own_data),
                    )
                    return _where(carry_on, new), [
                        x for x, d in zip(outputs, d_outputs, strict=True) if d is not None
                    ]

                _, pull = jax.vjp(
                    differentiated,
                    _where(const_on, consts),
                    _where(carry_on, own_carry),
                    own,
                    _where(data_on, own_data),
                )
                cotangents = (d_carry, [d for d in d_outputs if d is not None])
                jaxpr, _, _ = _jaxprs.trace(lambda cotangents: pull(cotangents)[2], cotangents)
                order = _jaxprs.order(jaxpr)
                g_consts, d_carry, grads, g_data = pull(cotangents)
                update = _leafwise.LeafwiseUpdate(
                    self.opt, own_state, jax.tree.unflatten(treedef, own), {}
                )
                # As the backward pass yields them, so that none has to wait for another.
                for number in sorted(range(len(grads)), key=lambda number: order[number]):
                    update.give(number, grads[number])
                tree, new_state = update.results()
                new = jax.tree.leaves(tree)
                own_stacks, states, d_data = jax.tree.map(
                    lambda x, part: jax.lax.dynamic_update_index_in_dim(x, part, index, 0),
                    (own_stacks, states, d_data),
                    (new, new_state, g_data),
                )
                d_consts = [old + new for old, new in zip(d_consts, g_consts, strict=True)]
                return own_stacks, states, d_carry, d_consts, d_data

            new_stacks, states, d_carry, d_consts, d_data = jax.lax.fori_loop(
                0, length, body, jax.tree.map(_meshes.settle, start)
            )
            self.give(_where(carry_on, carry_vars), d_carry)
            self.give(_where(const_on, const_vars), d_consts)
            self.give(_where(data_on, data_vars), d_data)
            for var, stays, value in zip(equation.outvars, still, operands.carry, strict=False):
                if stays and var in self.cotangents:
                    self.give([value], [self.cotangents.pop(var)])
            return jax.tree.unflatten(treedef, new_stacks), states

        return backward


def _where(chosen: Sequence[bool], values: Sequence[Any]) -> list[Any]:
    return [value for value, choose in zip(values, chosen, strict=True) if choose]


def _mix(chosen: Sequence[bool], values: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """`others` with the chosen ones replaced by `values`, in their order."""
    new = iter(values)
    return [next(new) if choose else other for choose, other in zip(chosen, others, strict=True)]


def _is_inexact(var: Any) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.inexact)


def _reaches(var: Any, active: set[Any]) -> bool:
    return not isinstance(var, _jaxprs.Literal) and var in active
