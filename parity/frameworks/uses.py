"""How a forward pass uses each weight."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Use:
    """The first use of a leaf.

    Attributes:
        order: its place among the first uses of all leaves.
        operation: product (of matrices, or a convolution), table (read by index), factor, term, or
            other.
        axes: of the leaf: "i" for one that is summed over or indexed, "o" for one of the result,
            "w0", "w1" ... for those of a window, "" where it is unknown.
    """

    order: int
    operation: str
    axes: tuple[str, ...]


# By name; a leaf that no output needs is not in it.
Uses = dict[str, Use]


def einsum_axes(equation: str, place: int) -> tuple[str, ...]:
    """Return the axes of an operand of an einsum: summed over, of the result alone, or shared."""
    operands, _, result = equation.replace(" ", "").partition("->")
    terms = operands.split(",")
    others = "".join(term for number, term in enumerate(terms) if number != place)
    if "->" not in equation:
        result = "".join(x for x in operands if operands.count(x) == 1)
    return tuple(
        "i" if x not in result else "" if x in others else "o"
        for x in terms[place].replace("...", ".")
    )
