"""What a compiled program sends between devices, read from its text.

XLA's compiled programs name every collective with the types of what enters it, the devices that
take part, and for loops how often they run: bytes on the wire are counted, not guessed.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One collective of a program, as often as it runs.

    Attributes:
      kind: one of `KINDS`.
      bytes: of what enters it on one device, each time.
      group: devices that exchange something with each other.
      times: how often it runs in one call of the program.
      hosts: on how many hosts those devices are.
    """

    kind: str
    bytes: int
    group: int
    times: int
    hosts: int = 1

    @property
    def payload(self) -> int:
        """Bytes that enter it on one device in one call of the program."""
        return self.bytes * self.times

    @property
    def sent(self) -> float:
        """Bytes that one device sends in one call, where collectives go around a ring."""
        return self.payload * ring_share(self.kind, self.group)


def ring_share(kind: str, group: int) -> float:
    """What one of `group` devices in a ring sends, for each byte that enters a collective on it."""
    n = group
    return {
        "all-reduce": 2 * (n - 1) / n,  # a reduce-scatter and an all-gather of the parts
        "all-gather": n - 1,  # what enters is a part
        "reduce-scatter": (n - 1) / n,
        "all-to-all": (n - 1) / n,
        "collective-permute": 1,
    }[kind]


def read(
    text: str, devices: int, host: int | None = None, as_on_gpus: bool = False
) -> list[Collective]:
    """All collectives of a compiled program, `compiled.as_text()`, of so many devices.

    Of the branches of a conditional the one that sends most is counted.

    Args:
      text: of the program.
      devices: that run it.
      host: devices of a host, whose numbers follow each other; all, if not said.
      as_on_gpus: whether to count in bfloat16 what was widened to float32 only because CPUs, for
        which the program was compiled, do not send bfloat16.

    Raises:
      ValueError: one is in a loop that does not say how often it runs.
    """
    found = re.findall(r"^(ENTRY )?%?([\w.-]+) .*\{\n((?: .*\n)*)\}", text, re.M)
    bodies = {name: body for _, name, body in found}
    (entry,) = (name for is_entry, name, _ in found if is_entry)
    known: dict[str, list[Collective]] = {}
    operations = {name: _operations(body) for name, body in bodies.items()}

    def of(name: str) -> list[Collective]:
        if name not in known:
            known[name] = [
                own for x in operations[name].values() for own in _of(x, operations[name])
            ]
        return known[name]

    def _of(x: Operation, others: dict[str, Operation]) -> Iterator[Collective]:
        kind = x.kind.removesuffix("-start")
        if x.kind.endswith(("-done", "-update")):
            return
        if kind in KINDS:
            ids = _group(x.attributes, devices)
            hosts = len({i // (host or devices) for i in ids})
            parts = [others[name] for name in x.operands]
            sizes = [
                _narrow(own, operations) if as_on_gpus else array_bytes(own.type) for own in parts
            ]
            yield Collective(kind, sum(sizes), len(ids), 1, hosts)
        elif x.kind == "while":
            inside = of(_named("body", x.attributes)) + of(_named("condition", x.attributes))
            count = re.search(r"known_trip_count\W+n\W+(\d+)", x.attributes)
            if inside and not count:
                raise ValueError(f"the loop {x.name} does not say how often it runs")
            for own in inside:
                yield own._replace(times=own.times * int(count[1]))  # type: ignore[index]
        elif x.kind == "conditional":
            yield from max(map(of, _branches(x.attributes)), key=sent)
        else:
            for called in re.findall(r"(?:to_apply|calls)=%?([\w.-]+)", x.attributes):
                yield from of(called)

    return [own for own in of(entry) if own.group > 1 and own.times]


class Operation(NamedTuple):
    """A line of a program's text; `operands` are the names of others in the same computation."""

    name: str
    type: str
    kind: str
    operands: list[str]
    attributes: str
    is_root: bool


def _operations(body: str) -> dict[str, Operation]:
    found = {}
    for line in body.splitlines():
        if match := OPERATION.match(line):
            root, name, type_, kind, rest = match.groups()
            operands, attributes = _split(rest)
            names = re.findall(r"%([\w.-]+)", operands)
            found[name] = Operation(name, type_, kind, names, attributes, bool(root))
    return found


def _narrow(x: Operation, computations: dict[str, dict[str, Operation]]) -> int:
    """Bytes of an operand, in bfloat16 if it was only just widened from that."""
    here = next(own for own in computations.values() if own.get(x.name) is x)
    own = x
    while own.kind in ("bitcast", "copy", "transpose", "reshape", "fusion"):
        if own.kind == "fusion":
            here = computations[_named("calls", own.attributes)]
            own = next(other for other in here.values() if other.is_root)
        else:
            own = here[own.operands[0]]
    widened = own.kind == "convert" and here[own.operands[0]].type.startswith("bf16[")
    return array_bytes(x.type) // (2 if widened and x.type.startswith("f32[") else 1)


OPERATION = re.compile(r"^ +(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")


def _split(rest: str) -> tuple[str, str]:
    """The operands in front of the parenthesis that closes theirs, and the attributes behind it."""
    depth = 1
    for place, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if not depth:
            return rest[:place], rest[place:]
    return rest, ""


def _named(attribute: str, attributes: str) -> str:
    return re.findall(rf"\b{attribute}=%?([\w.-]+)", attributes)[0]


def _branches(attributes: str) -> list[str]:
    if listed := re.search(r"branch_computations=\{(.*?)\}", attributes):
        return re.findall(r"%?([\w.-]+)", listed[1])
    return [_named(f"{answer}_computation", attributes) for answer in ("true", "false")]


def _group(attributes: str, devices: int) -> list[int]:
    """The numbers of the devices that the first one exchanges something with, and its own.

    XLA writes them in full, `{{0,1},{2,3}}`; as `[2,2]<=[4]`, two groups of two of a range that may
    be reshaped and transposed; or as axes of a mesh, `mesh['host'=2,'device'=2] {'device'}`.
    """
    if axes := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", axes[1])}
        named = re.findall(r"'(\w+)'", axes[2])
        if ":" in axes[2]:
            raise ValueError(f"cannot read a part of an axis, {axes[0]}")
        places = np.arange(math.prod(sizes.values())).reshape(*sizes.values())
        last = [i for i, name in enumerate(sizes) if name in named]
        count = math.prod(sizes[name] for name in named)
        places = np.moveaxis(places, last, range(-len(last), 0)) if last else places
        return [int(i) for i in places.reshape(-1, count)[0]]
    if iota := re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        sizes_ = [int(i) for i in iota[3].split(",")]
        places = np.arange(math.prod(sizes_)).reshape(sizes_)
        if iota[4]:
            places = places.transpose([int(i) for i in iota[4].split(",")])
        return [int(i) for i in places.reshape(-1, int(iota[2]))[0]]
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return [int(i) for i in listed[1].split(",")]
    return [*range(devices)]  # `replica_groups={}`, and the pairs of a collective-permute


def array_bytes(types: str) -> int:
    """Of one or more types as in `f32[1024,32]{1,0}`."""
    arrays = re.findall(r"\b([a-z]+)(\d*)(?:e\d\w*)?\[([\d,]*)\]", types)
    return sum(
        int(bits or 8) * math.prod(int(i) for i in axes.split(",") if i) // 8
        for kind, bits, axes in arrays
        if kind != "token"
    )


def payload(found: list[Collective]) -> int:
    """Bytes that enter collectives on one device in one call of a program."""
    return sum(own.payload for own in found)


def sent(found: list[Collective]) -> float:
    """Bytes that one device sends in one call of a program."""
    return sum(own.sent for own in found)


def by_kind(found: list[Collective]) -> dict[str, dict[str, int]]:
    """What enters collectives on one device, and how many run, for each kind that there is."""
    kinds: dict[str, dict[str, int]] = {}
    for own in found:
        total = kinds.setdefault(own.kind, {"bytes": 0, "count": 0})
        total["bytes"] += own.payload
        total["count"] += own.times
    return kinds
