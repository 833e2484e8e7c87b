"""A frozen block of settings, and the messages about invalid values."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from zarrcache._keys import safe_repr
from zarrcache.errors import ConfigError

__all__ = ["Block"]


class Block(BaseModel):
    """A frozen block of settings; invalid values raise one ConfigError that names every key."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
    #: What stands before its keys in messages.
    _prefix: ClassVar[str] = ""
    #: What to do about a required key that is missing.
    _remedies: ClassVar[Mapping[str, str]] = {}

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as exc:
            raise ConfigError("\n".join(_explain(type(self), e) for e in exc.errors())) from None


def _explain(model: type[Block], error: ErrorDetails) -> str:
    """Describe one problem in one line: the key, what is wrong, what to write."""
    where = model._prefix + ".".join(str(part) for part in error["loc"])
    inner = error.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):  # raised by a nested block, with its own message
        return "\n".join(f"{where}.{line}" for line in str(inner).splitlines())
    if error["type"] == "extra_forbidden":
        known = list(model.model_fields)
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(known)}."
        return f"{where} is not a setting. {hint}"
    if error["type"] == "missing":
        return f"{where} is missing. {model._remedies.get(where, '')}".rstrip()
    if inner is not None:  # raised by a validator, whose message names the value
        message = f"{str(inner).rstrip('.')}."
        return f"{where}: {message}" if error["loc"] else message
    # s3_kwargs may hold secrets.
    got = "" if error["loc"][:1] == ("s3_kwargs",) else f" (got {safe_repr(error['input'])})"
    return f"{where}: has to be {_EXPECTED.get(error['type'], _described)(error)}{got}."


#: What a value has to be, by pydantic's error types.
_EXPECTED: dict[str, Callable[[ErrorDetails], str]] = {
    "literal_error": lambda error: error["ctx"]["expected"],
    "greater_than": lambda error: f"greater than {error['ctx']['gt']}",
    "greater_than_equal": lambda error: f"at least {error['ctx']['ge']}",
    "less_than": lambda error: f"less than {error['ctx']['lt']}",
    "less_than_equal": lambda error: f"at most {error['ctx']['le']}",
}


def _described(error: ErrorDetails) -> str:
    """Describe a valid value for an error type such as ``int_parsing`` or ``bool_type``."""
    kinds = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "string": "text",
        "path": "a path",
        "dict": "keys and values",
        "model": "keys and values",
        "tuple": "a list",
    }
    return kinds.get(error["type"].partition("_")[0], f"valid: {error['msg']}")
