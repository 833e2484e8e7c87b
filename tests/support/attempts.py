"""One request under a retry policy, without an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from zarrcache._keys import ObjectInfo
from zarrcache.origin._requests import RetryPolicy
from zarrcache.origin._s3_errors import TransientError

__all__ = ["call"]


def call(policy: RetryPolicy, function: Callable[[float], Any], url: str) -> Any:
    """Call a function with the seconds that are left until it does not raise TransientError."""

    def send(missing: list[ObjectInfo], remaining_s: float) -> Iterator[tuple[ObjectInfo, Any]]:
        try:
            answer: Any = [function(remaining_s)]
        except TransientError as error:
            answer = error
        yield missing[0], answer

    answers = policy.call_all(
        [ObjectInfo("k", 0, "")], send, lambda _, answer: answer, url_of=lambda _: url
    )
    ((result,),) = answers
    return result
