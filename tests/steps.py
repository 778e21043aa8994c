"""The ordinary step, and a loop of steps, that others are held against."""

import jax
import optax


def at_once(loss_fn, tx):
    """The ordinary step: all gradients, one update."""

    def step(params, state, *batch, **extra_args):
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, state = tx.update(grads, state, params, **extra_args)
        return loss, optax.apply_updates(params, updates), state

    return step


def train(step, tx, params, batches):
    """Losses of every step, and the last parameters and state."""

    def body(carry, batch):
        loss, *carry = step(*carry, batch)
        return tuple(carry), loss

    @jax.jit
    def run(params):
        (params, state), losses = jax.lax.scan(body, (params, tx.init(params)), batches)
        return losses, params, state

    return run(params)
