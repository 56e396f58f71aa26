"""What a compiled program does to a cache, read off the program: exact, where times are not."""

import re
from collections.abc import Iterator, Sequence

# An array of the cache's shape comes out of these without being made anew.
_HANDED_ON = "parameter", "get-tuple-element", "bitcast", "tuple", "while", "conditional", "call"
# These write a part of their first operand, in its own memory.
_IN_PLACE = "dynamic-update-slice", "scatter"
_COPIES = "copy", "copy-start", "transpose"

_INSTRUCTION = re.compile(r"(ROOT )?%?\S+ = (\w+\[[\d,]*\])?.*?\s?([a-z][\w-]*)\(")


def remade_caches(program: str, shape: Sequence[int]) -> list[str]:
    """The instructions of a compiled program that make a cache anew, copies above all.

    A program may hold a branch that zeroes garbage, which is taken where garbage is not finite. So
    in what runs every time no array of the cache's shape may be made, and in branches none copied.

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
    """Name and instructions of every computation; the entry's name says that it is that."""
    name, lines = None, []
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
    """What an instruction does; for a fusion, what its result comes from."""
    called = re.search(r"calls=%([\w.-]+)", line)
    if operation != "fusion" or called is None:
        return operation
    for inner in computations[called.group(1)]:
        if inner.startswith("ROOT "):
            return _INSTRUCTION.match(inner).group(3)
    return operation
