"""JSON of values that may hold numbers which JSON does not know."""

import json
import math
from collections.abc import Mapping


def to_json(document: object, *, indent: int | None = 1, as_null: bool = False) -> str:
    """Return a document as JSON text with a newline at its end.

    Args:
        document: mappings, sequences, text and numbers.
        indent: of nested lines; None for a single line.
        as_null: write a number that is not finite as null; as text ("nan", "inf") otherwise.
    """

    def finite(value: object) -> object:
        if isinstance(value, Mapping):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None if as_null else str(value)
        return value

    return json.dumps(finite(document), indent=indent, allow_nan=False) + "\n"
