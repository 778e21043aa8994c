"""How much memory does a training step take, and how long does it take to compile?

    python benchmarks/memory.py --model gpt2 --methods none full sketched
    python benchmarks/memory.py --model llama-7b --dtype bfloat16 --methods layerwise --run

Nothing is allocated without `--run`: the figures are those of the compiled program. Its peak is
that of its arguments, its temporaries and those of its results that do not take the place of an
argument. `beyond` is what the peak adds to the parameters and to Adafactor's state: accumulators,
momentum, gradients, activations. With `--run`, two updates are made, and the allocator says what
the peak was. Every method has a process of its own: an allocator's peak never falls, and what one
method has compiled must not speed up the next.
"""

import dataclasses
from typing import Any

import jax
import optax

from florax_benchmarks import methods, results, tables, workload


@dataclasses.dataclass(frozen=True)
class Settings(workload.Workload):
    run: bool = False  # also make two updates, for the peak that the device reports


def measure(s: Settings, name: str, known: str | None) -> dict[str, Any] | None:
    jax.jit(lambda x: x + 1).lower(1.0).compile()  # starts the compiler, on no method's account
    lowered = workload.lower_method(s, name)
    if (program := results.fingerprint(lowered.program)) == known:
        return None
    compiled = lowered.compile()
    m = compiled.step.memory_analysis()
    unaliased = m.output_size_in_bytes - m.alias_size_in_bytes
    adafactor = jax.eval_shape(optax.adafactor(methods.LEARNING_RATE).init, compiled.params)
    row = {
        "program": program,
        "params_bytes": tree_bytes(compiled.params),
        "adafactor_bytes": tree_bytes(adafactor),
        "state_bytes": tree_bytes(compiled.state),
        "argument_bytes": m.argument_size_in_bytes,
        "output_bytes": m.output_size_in_bytes,
        "aliased_bytes": m.alias_size_in_bytes,
        "temporary_bytes": m.temp_size_in_bytes,
        "peak_bytes": m.argument_size_in_bytes + m.temp_size_in_bytes + unaliased,
        "compile_seconds": round(compiled.seconds, 2),
    }
    return row | device_memory(compiled, s.shape.vocabulary) if s.run else row


def device_memory(compiled: workload.Compiled, vocabulary: int) -> dict[str, Any]:
    """The allocator's peak over two updates; None where making the parameters took more."""
    running = workload.Running(compiled, vocabulary)
    before = peak()
    seconds = [running.update() for _ in range(2)]
    device_peak = peak() if peak() > before else None
    micro_step_ms = round(min(seconds) * 1e3, 2)
    return {"device_peak_bytes": device_peak, "micro_step_ms": micro_step_ms, "loss": running.loss}


def peak() -> int:
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def tree_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def main(s: Settings) -> None:
    rows = workload.measure_each(s, "memory", measure, run=s.run)
    print(f"{s.title}; MiB:\n{tables.memory(rows)}")


if __name__ == "__main__":
    main(results.settings(Settings, f"{__doc__}\n{methods.__doc__}"))
