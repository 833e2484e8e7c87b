"""The sample configs: read from the installation, filled in, and turned into a JSON schema.

The comments of ``configs/s3_cached.yaml`` are the only description of the keys.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from zarrcache.config import DataConfig
from zarrcache.errors import ConfigError

__all__ = ["config_schema", "filled_in", "key_comments", "sample"]

_KEY = re.compile(r"( *)([a-z0-9_]+):(.*)")
_INDENT = 2
_DEFAULT = re.compile(r"^Default: (.*?)(?: \(.*\))?$", re.MULTILINE)
#: In any setting a string may stand for a value of another type: ``limit: ${CACHE_LIMIT}``.
_VARIABLE = {"type": "string", "pattern": r"\$"}


def sample(name: str = "s3_cached.yaml") -> str:
    """Text of a sample config: ``s3_cached.yaml``, ``s3.yaml`` or ``local.yaml``."""
    installed = files("zarrcache") / "configs"
    # An editable installation has the files where the checkout has them.
    directory = installed if installed.is_dir() else Path(__file__).parents[2] / "configs"
    return (directory / name).read_text(encoding="utf-8")


def key_comments(text: str) -> dict[tuple[str, ...], str]:
    """The comment above each key of a config, by the path of the key."""
    found: dict[tuple[str, ...], str] = {}
    comment: list[str] = []
    for line, path in _lines(text):
        if path:
            found[path] = "\n".join(comment)
        if line.lstrip().startswith("#"):
            comment.append(line.lstrip().removeprefix("#").removeprefix(" ").rstrip())
        else:
            comment = []
    return found


def filled_in(text: str, values: Mapping[str, str | None]) -> str:
    """Replace values of a config, by dotted key (``cache.dir``), and keep its comments.

    None keeps a value. A key that the config does not have is an error.
    """
    missing = {key for key, value in values.items() if value is not None}
    lines = []
    for line, path in _lines(text):
        key = ".".join(path)
        value = values.get(key)
        if value is not None:
            missing.discard(key)
            line = f"{line[: line.index(':')]}: {_as_yaml(value)}"
        lines.append(line)
    if missing:
        raise ConfigError(f"The sample config has no key {', '.join(sorted(missing))}.")
    return "\n".join(lines) + "\n"


def config_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a training config, for editors."""
    schema = DataConfig.model_json_schema(mode="validation")
    schema["required"].remove("functional")  # where map_dir is a file list
    definitions = schema.get("$defs", {})
    for definition in [schema, *definitions.values()]:
        properties = definition.get("properties", {})
        for name, of_key in properties.items():
            of_key.pop("title", None)
            of_key.pop("default", None)  # in the units of the code: bytes where users write GiB
            properties[name] = _or_variable(of_key)
        definition.pop("description", None)  # the class docstring speaks to programmers
    for path, comment in key_comments(sample()).items():
        if (of_key := _at(schema, definitions, path)) is not None:
            of_key["description"] = comment
            if (match := _DEFAULT.search(comment)) and match[1] != "as below":
                of_key["default"] = yaml.safe_load(match[1])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "zarrcache training config",
        "additionalProperties": True,
    }


def _lines(text: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each line, and the path of the key that it holds."""
    parents: list[str] = []
    for line in text.splitlines():
        path: tuple[str, ...] = ()
        if match := _KEY.fullmatch(line):
            parents = [*parents[: len(match[1]) // _INDENT], match[2]]
            path = tuple(parents)
        yield line, path


def _as_yaml(value: str) -> str:
    """``value`` as it may stand behind a key, quoted where YAML reads something else."""
    try:
        is_plain = yaml.safe_load(f"key: {value}") == {"key": value}
    except yaml.YAMLError:
        is_plain = False
    return value if is_plain else json.dumps(value, ensure_ascii=False)


def _or_variable(of_key: dict[str, Any]) -> dict[str, Any]:
    """Accept a variable beside numbers, booleans and words of a list."""
    kinds = of_key.get("anyOf", [of_key])
    if any("$ref" in kind or kind.get("type") == "object" for kind in kinds):
        return of_key
    if any("string" in kind.get("type", ()) and "enum" not in kind for kind in kinds):
        return of_key
    return {"anyOf": [*kinds, _VARIABLE]}


def _at(
    schema: dict[str, Any], definitions: dict[str, Any], path: tuple[str, ...]
) -> dict[str, Any] | None:
    block, of_key = schema, None
    for part in path:
        of_key = block.get("properties", {}).get(part)
        if of_key is None:
            return None
        references = [kind["$ref"] for kind in of_key.get("anyOf", [of_key]) if "$ref" in kind]
        block = definitions[references[0].rpartition("/")[2]] if references else {}
    return of_key
