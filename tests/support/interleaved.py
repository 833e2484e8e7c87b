"""Another thread at the worst moment: between any two lines of a function, not by chance."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

__all__ = ["interleaved"]


def interleaved(
    function: Callable[..., Any], call: Callable[[], Any], meanwhile: Callable[[], object]
) -> Iterator[Any]:
    """Results of ``call`` with ``meanwhile`` called before the first, second, ... line of
    ``function`` that it executes.
    """
    place, has_more = 0, True
    while has_more:
        lines = 0

        def at_line(frame: FrameType, event: str, _: Any, *, place: int = place) -> Any:
            nonlocal lines
            if event == "line":
                if lines == place:
                    meanwhile()
                lines += 1
            return at_line

        def at_call(frame: FrameType, event: str, _: Any, at_line: Any = at_line) -> Any:
            return at_line if frame.f_code is function.__code__ else None

        before = sys.gettrace()
        sys.settrace(at_call)
        try:
            result = call()
        finally:
            sys.settrace(before)
        has_more = lines > place
        place += 1
        yield result
