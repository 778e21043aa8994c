"""How long does a micro-step take, against full-size accumulation?

    python benchmarks/speed.py --model gpt2 --methods full sketched

A micro-step is an update's time divided by its micro-batches, the optimizer's own work included.
The methods take turns, an update each, so that a change in the machine's clock meets all of them;
the ratio is the median of those of the rounds.
"""

import dataclasses
import functools
from typing import Any

from florax_benchmarks import methods, results, tables, timing, workload


@dataclasses.dataclass(frozen=True)
class Settings(workload.Workload):
    rounds: int = 5  # timed updates of each method, after one that is not


def measure(s: Settings, known: str | None) -> dict[str, Any] | None:
    lowered = {name: workload.lower_method(s, name) for name in s.methods}
    if (program := results.fingerprint(*(x.program for x in lowered.values()))) == known:
        return None
    running = {
        name: workload.Running(x.compile(), s.shape.vocabulary) for name, x in lowered.items()
    }
    times = timing.take_turns({name: r.update for name, r in running.items()}, s.rounds)
    return {"program": program, **times}


def main(s: Settings) -> None:
    settings = s.settings() | {"methods": list(s.methods)}
    row = results.get_of_program(s.results, "speed", settings, functools.partial(measure, s))
    print(f"{s.title}; milliseconds a micro-step:\n{tables.times([row])}")


if __name__ == "__main__":
    main(results.settings(Settings, f"{__doc__}\n{methods.__doc__}"))
