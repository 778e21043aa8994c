"""What a compiled program sends between devices, read from its text.

XLA's compiled programs name every collective with the types of what enters it, the devices that
take part, and for loops how often they run: bytes on the wire are counted, not guessed.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One collective of a program, as often as it runs.

    Attributes:
      kind: one of `KINDS`.
      bytes: of what enters it on one device, each time.
      group: devices that exchange something with each other.
      times: how often it runs in one call of the program.
    """

    kind: str
    bytes: int
    group: int
    times: int

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


def read(text: str, devices: int) -> list[Collective]:
    """All collectives of a compiled program, `compiled.as_text()`, of so many devices.

    Of the branches of a conditional the one that sends most is counted. Raises ValueError if one is
    in a loop that does not say how often it runs.
    """
    found = re.findall(r"^(ENTRY )?%?([\w.-]+) .*\{\n((?: .*\n)*)\}", text, re.M)
    bodies = {name: body for _, name, body in found}
    (entry,) = (name for is_entry, name, _ in found if is_entry)
    known: dict[str, list[Collective]] = {}

    def of(name: str) -> list[Collective]:
        if name not in known:
            known[name] = [*_of_lines(bodies[name].splitlines())]
        return known[name]

    def _of_lines(lines: list[str]) -> Iterator[Collective]:
        operations = [m.groups() for line in lines if (m := OPERATION.match(line))]
        types = {name: kind for name, kind, _, _ in operations}
        for name, _, operation, rest in operations:
            if operation.endswith(("-done", "-update")):
                continue
            operands, attributes = _split(rest)
            kind = operation.removesuffix("-start")
            if kind in KINDS:
                names = re.findall(r"%([\w.-]+)", operands)
                size = sum(array_bytes(types[operand]) for operand in names)
                yield Collective(kind, size, _group(attributes, devices), 1)
            elif operation == "while":
                inside = of(_named("body", attributes))
                count = re.search(r"known_trip_count\W+n\W+(\d+)", attributes)
                if inside and not count:
                    raise ValueError(f"the loop {name} does not say how often it runs")
                for own in inside:
                    yield own._replace(times=own.times * int(count[1]))  # type: ignore[index]
            elif operation == "conditional":
                yield from max(map(of, _branches(attributes)), key=sent)
            else:
                for called in re.findall(r"(?:to_apply|calls)=%?([\w.-]+)", attributes):
                    yield from of(called)

    return [own for own in of(entry) if own.group > 1 and own.times]


OPERATION = re.compile(r"^ +(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")


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


def _group(attributes: str, devices: int) -> int:
    """Devices that take part together: `{{0,1},{2,3}}` and `[2,2]<=[4]` are two groups of two."""
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed[1].split(","))
    return devices  # `replica_groups={}`, and the pairs of a collective-permute


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
