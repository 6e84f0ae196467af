"""Events as plain values, as ``metrics.jsonl`` holds them, with every field that is declared."""

from __future__ import annotations

import dataclasses
from types import UnionType
from typing import Any, get_origin, get_type_hints


def record(kind: type, **values: Any) -> dict[str, Any]:
    """An event of ``kind`` at time 0 in which what ``values`` does not give is 0, false, empty or null."""
    assert values.keys() <= {field.name for field in dataclasses.fields(kind)}
    plain = {
        name: None if get_origin(hint) is UnionType else (get_origin(hint) or hint)()
        for name, hint in get_type_hints(kind).items()
    }
    return {"event": kind.__name__, "time": 0.0} | plain | values
