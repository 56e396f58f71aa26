"""Copies of a cache in a compiled program: exact numbers, unlike times."""

import re
from collections.abc import Iterator, Sequence

# These return an array of the cache's shape without allocating one.
_HANDED_ON = "parameter", "get-tuple-element", "bitcast", "tuple", "while", "conditional", "call"
# These write a part of their first operand, in its own memory.
_IN_PLACE = "dynamic-update-slice", "scatter"
_COPIES = "copy", "copy-start", "transpose"

_INSTRUCTION = re.compile(r"(ROOT )?%?\S+ = (\w+\[[\d,]*\])?.*?\s?([a-z][\w-]*)\(")


def remade_caches(program: str, shape: Sequence[int]) -> list[str]:
    """Return the instructions of a compiled program that allocate a cache, copies above all.

    A branch may zero free slots, where they are not finite: an array of the cache's shape must not
    be allocated where the program always runs, and not copied in branches.

    Args:
        program: in XLA's text form, after its optimization.
        shape: of the keys of a layer.
    """
    computations = dict(_computations(program))
    entry = next(name for name in computations if name.startswith("ENTRY "))
    every_time, found = {entry}, [entry]
    while found:
        for line in computations[found.pop()]:
            for name in re.findall(r"(?:body|condition|to_apply)=%([\w.-]+)", line):
                if name in computations and name not in every_time:
                    every_time.add(name)
                    found.append(name)
    branches = set()
    for lines in computations.values():
        for line in lines:
            for names in re.findall(r"branch_computations=\{([^}]*)\}", line):
                branches.update(name.strip(" %") for name in names.split(","))
            branches.update(re.findall(r"(?:true|false)_computation=%([\w.-]+)", line))
    array = f"[{','.join(map(str, shape))}]"
    remade = []
    for name in every_time | (branches & set(computations)):
        for line in computations[name]:
            instruction = _INSTRUCTION.match(line)
            if instruction is None or not (instruction.group(2) or "").endswith(array):
                continue
            made = _operation(line, instruction.group(3), computations)
            if made in _COPIES or (name in every_time and made not in _HANDED_ON + _IN_PLACE):
                remade.append(line)
    return remade


def _computations(program: str) -> Iterator[tuple[str, list[str]]]:
    """Yield name and instructions of every computation; the entry's name begins with ENTRY."""
    name: str | None = None
    lines: list[str] = []
    for line in program.splitlines():
        start = re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line)
        if start:
            name, lines = (start.group(1) or "") + start.group(2), []
        elif line.startswith("}") and name is not None:
            yield name, lines
            name = None
        elif name is not None:
            lines.append(line.strip())


def _operation(line: str, operation: str, computations: dict[str, list[str]]) -> str:
    """Return the operation of an instruction; for a fusion, that of its result."""
    called = re.search(r"calls=%([\w.-]+)", line)
    if operation != "fusion" or called is None:
        return operation
    for inner in computations[called.group(1)]:
        root = _INSTRUCTION.match(inner) if inner.startswith("ROOT ") else None
        if root is not None:
            return root.group(3)
    return operation
