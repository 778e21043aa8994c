"""How long a step takes on many devices, of the bytes it sends and a stated model of the links.

An update computes for as long as its floating-point operations take, and sends what its compiled
program says. A collective that spans hosts is done in two steps, as NCCL's trees and rings do in
effect: among the devices of a host, and among those of all hosts that have the same place in
theirs, each with a link of its own.
"""

import dataclasses
import math
from typing import Any, NamedTuple

from florax_benchmarks import models


@dataclasses.dataclass(frozen=True)
class Links:
    """The assumptions. Bandwidths are of one device, in one direction."""

    devices_of_host: int = 8
    within: float = 450e9  # bytes a second among the devices of a host: NVLink 4
    across: float = 50e9  # bytes a second among hosts: InfiniBand of 400 Gb/s a device
    reached: float = 0.8  # of these bandwidths
    hop_within: float = 2e-6  # seconds, for each other device of the host
    hop_across: float = 5e-6  # seconds, for each halving of the number of hosts
    peak: float = 989e12  # floating-point operations a second in bfloat16: H100 SXM
    utilization: float = 0.4  # of that peak, recomputed layers counted as work

    def describe(self) -> str:
        return (
            f"{self.devices_of_host} devices a host; {self.within / 1e9:.0f} GB/s a device within "
            f"one and {self.across / 1e9:.0f} GB/s ({self.across * 8 / 1e9:.0f} Gb/s) across, of "
            f"which {self.reached:.0%} are reached; latencies of {self.hop_within * 1e6:g} µs a "
            f"device within, and of {self.hop_across * 1e6:g} µs for each halving of the hosts; "
            f"{self.peak / 1e12:.0f} TFLOP/s at {self.utilization:.0%} utilization"
        )


class Traffic(NamedTuple):
    """Collectives of one kind among the same devices, of an update or of each micro-batch.

    Attributes:
      kind: one of `collectives.KINDS`.
      spans: "devices" of a host, "hosts" (a device of each), or "all".
      each: "micro-batch" or "update".
      fixed: bytes that enter on one device, however many devices there are.
      divided: bytes to be divided by the devices that have a part of the parameters each.
      count: how many collectives.
    """

    kind: str
    spans: str
    each: str
    fixed: float
    divided: float
    count: float

    def bytes(self, parts: int) -> float:
        """That enter on one device if parameters are in so many parts."""
        return self.fixed + self.divided / parts


class Step(NamedTuple):
    """Of one update, on one device: seconds, and bytes that it sends."""

    compute: float
    inside: float  # of collectives in every micro-batch, which may overlap with computing
    after: float  # of those once an update, which wait for the last micro-batch
    bytes_within: float
    bytes_across: float

    @property
    def apart(self) -> float:
        """Seconds where nothing overlaps."""
        return self.compute + self.inside + self.after

    @property
    def overlapped(self) -> float:
        """Seconds where what can overlap does so in full."""
        return max(self.compute, self.inside) + self.after


def parts_of(division: str, devices: int, links: Links) -> int:
    """In how many parts the parameters are."""
    local = min(devices, links.devices_of_host)
    return {"data": 1, "fsdp": devices, "hybrid": local}[division]


def step(
    traffic: list[Traffic],
    division: str,
    devices: int,
    accumulate: int,
    compute: float,
    links: Links,
) -> Step:
    """An update of `accumulate` micro-batches, each of which computes for so many seconds."""
    seconds = {"micro-batch": 0.0, "update": 0.0}
    sent = [0.0, 0.0]
    for own in traffic:
        times = accumulate if own.each == "micro-batch" else 1
        within, across, latency = wire(own, division, devices, links)
        reached = links.reached
        own_seconds = within / (links.within * reached) + across / (links.across * reached)
        seconds[own.each] += times * (own_seconds + own.count * latency)
        sent = [sent[0] + times * within, sent[1] + times * across]
    return Step(compute * accumulate, seconds["micro-batch"], seconds["update"], *sent)


def wire(own: Traffic, division: str, devices: int, links: Links) -> tuple[float, float, float]:
    """Bytes that one device sends within its host and across hosts, and seconds of latency each.

    A sum across devices that have a part of the parameters each is a reduce-scatter, as each needs
    its part only: XLA makes it one for GPUs, though not for CPUs.
    """
    g = min(devices, links.devices_of_host)
    h = devices // g
    g, h = {"devices": (g, 1), "hosts": (1, h), "all": (g, h)}[own.spans]
    size = own.bytes(parts_of(division, devices, links))
    kind = own.kind
    hops = (g - 1) * links.hop_within, math.log2(h) * links.hop_across
    scattered_within = division != "data" or kind == "reduce-scatter"
    scattered_across = division == "fsdp" or kind == "reduce-scatter"
    if kind in ("all-reduce", "reduce-scatter"):
        passes = (1 if scattered_within else 2), (1 if scattered_across else 2)
        within = passes[0] * (g - 1) / g * size
        across = passes[1] * (h - 1) / h * size / g
        return within, across, passes[0] * hops[0] + passes[1] * hops[1]
    if kind == "all-gather":  # across hosts first: then all that a host's devices have got
        return (g - 1) * h * size, (h - 1) * size, sum(hops)
    if kind == "all-to-all":
        return (g - 1) / (g * h) * size, (h - 1) / h * size, sum(hops)
    return (0.0, size, hops[1]) if h > 1 else (size, 0.0, hops[0])


def operations(shape: models.Shape, tokens: int, length: int) -> float:
    """Floating-point operations of a micro-batch of so many tokens, in rows of `length`.

    Two for each weight and token forward, twice that backward, and the layers' forward again, which
    are checkpointed; attention is computed in full.
    """
    sizes = models.parameter_shapes(shape, "float32")
    matrices = [x.shape for x in _leaves(sizes["blocks"]) if len(x.shape) == 3]
    layers = 2 * sum(math.prod(axes) for axes in matrices)
    attention = 4 * shape.layers * shape.heads * shape.head_size * length
    head = 2 * shape.vocabulary * shape.width
    return tokens * (4 * (layers + attention) + 4 * head)


def _leaves(tree: Any) -> list[Any]:
    return [y for x in tree.values() for y in (_leaves(x) if isinstance(x, dict) else [x])]


def compute_seconds(shape: models.Shape, tokens: int, length: int, links: Links) -> float:
    """Of a micro-batch, on one device."""
    return operations(shape, tokens, length) / (links.peak * links.utilization)


def enough_compute(dense: Step, sketched: Step, gain: float) -> float:
    """Seconds of computing from which on dense takes no more than `gain` times as long as sketched.

    Without overlap: (C + D) / (C + S) = gain, for C.
    """
    d, s = (own.inside + own.after for own in (dense, sketched))
    return max(0.0, (d - gain * s) / (gain - 1))
