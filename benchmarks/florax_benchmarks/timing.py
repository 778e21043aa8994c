"""Times of several things that take turns, so that a change in the clock meets all of them."""

import statistics
from collections.abc import Callable


def take_turns(seconds: dict[str, Callable[[], float]], rounds: int, warmup: int = 1) -> dict:
    """Medians over rounds: milliseconds, and ratios to the first, which are taken in each round.

    Each function does its work once and says how many seconds a unit of it took.
    """
    counted = [{name: f() for name, f in seconds.items()} for _ in range(warmup + rounds)][warmup:]
    against = next(iter(seconds))
    medians = {n: statistics.median(r[n] for r in counted) * 1e3 for n in seconds}
    ratios = {n: statistics.median(r[n] / r[against] for r in counted) for n in seconds}
    return {
        "against": against,
        "milliseconds": {n: round(x, 3) for n, x in medians.items()},
        "ratio": {n: round(x, 4) for n, x in ratios.items()},
        "rounds": [{n: round(x * 1e3, 3) for n, x in r.items()} for r in counted],
    }
