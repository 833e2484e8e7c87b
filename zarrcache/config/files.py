"""Read training configs: YAML files and mappings, variables, and the blocks of Hydra and electrai.

The result is always the same: a flat dict of the keys that describe one dataset. The forms are

* the keys themselves (``data_dir``, ``map_dir``, ``cache``, ...) at the top of the file;
* a ``data:`` (or ``datamodule:``) block with these keys, or with ``config:``, the path of such a
  file, its keys, or several of them: the block of a ``ZarrDataModule`` in a Hydra config;
* a ``data:`` block with ``root:``, a file list, or ``datasets:``, several of them: the block of
  electrai's ``RhoRead`` or of ``RhoDataModule``. ``data_dir`` and ``label_dir`` may be given too.

Hydra itself is not needed to read them.
"""

from __future__ import annotations

import os
import posixpath
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from zarrcache._keys import is_url, safe_repr
from zarrcache.errors import ConfigError

__all__ = [
    "VARIABLE",
    "VARIABLE_IN_BRACES",
    "YamlLoader",
    "as_dict",
    "datasets_of",
    "datasets_of_configs",
    "expand",
    "plain",
    "read_datasets",
]

#: ``${NAME``, ``${NAME:-``, and Hydra's ``${oc.env:NAME`` and ``${oc.env:NAME,``, with or without
#: the backslash that keeps Hydra from reading them.
VARIABLE_IN_BRACES = re.compile(
    r"\\?\$\{(?:oc\.env:\s*([A-Za-z_][A-Za-z0-9_]*)\s*(,)?|([A-Za-z_][A-Za-z0-9_]*)(:-)?)"
)
#: Also ``$NAME`` and ``$$``, except in secrets: they may hold a dollar sign.
VARIABLE = re.compile(VARIABLE_IN_BRACES.pattern + r"|\$([A-Za-z_][A-Za-z0-9_]*|\$)")
#: ``${paths.data}``, a reference of OmegaConf to another key of the file.
_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*)\}")

#: Keys that only a config of this package or of electrai's older loaders has at its top.
_OWN_KEYS = frozenset({"data_dir", "label_dir", "map_dir", "data_path", "label_path", "map_path"})
#: Older names of electrai for the same things.
_OLDER_NAMES = {"data_path": "data_dir", "label_path": "label_dir", "map_path": "map_dir"}
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_MOST_DIGITS = 40
_BLOCKS = ("data", "datamodule")
#: Keys that a `datasets` entry of electrai may have, and of the block those that hold for all.
_SPEC_KEYS = frozenset({"root", "split_file", "val_frac", "dataset_id", "data_dir", "label_dir"})


def expand(value: object, variable: re.Pattern[str] = VARIABLE) -> object:
    """Expand environment variables in all strings of a value.

    ``${NAME:-default}`` as in the shell, so empty counts as unset; ``${oc.env:NAME,default}`` as in
    Hydra, where it does not. ``$$`` is a dollar sign.
    """
    if isinstance(value, str):
        return _expand_text(value, variable)
    if isinstance(value, Mapping):
        return {k: expand(v, variable) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [expand(v, variable) for v in value]
    return value


def _expand_text(text: str, variable: re.Pattern[str]) -> str | None:
    match = variable.search(text)
    if match is None:
        return text
    before, end = text[: match.start()], match.end()
    if match[0] == "$$":
        return f"{before}${_expand_text(text[end:], variable)}"
    if not match[0].lstrip("\\").startswith("${"):
        found = os.environ.get(match[5])
        if not found:
            raise _unset(match[5], text, " For a dollar sign itself write $$.")
        return f"{before}{found}{_expand_text(text[end:], variable)}"
    depth = 1  # the default may contain variables: ${A:-${B:-/tmp}}
    while depth and end < len(text):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    default, has_default = text[match.end() : end - 1], match[2] or match[4]
    if depth or (default.strip() and not has_default):
        raise ConfigError(
            f"{text!r} holds a ${{ that is not a variable. Write ${{NAME}}, ${{NAME:-default}} or "
            "${oc.env:NAME,default}; other resolvers of Hydra need Hydra: write their result out."
        )
    if match[1]:
        found = os.environ.get(match[1])
        if found is None and has_default:
            found = _omegaconf_text(default, variable)
            if found is None and not before and end == len(text):
                return None
    else:
        found = os.environ.get(match[3]) or None
        if found is None and has_default:
            found = _expand_text(default, variable)
    if found is None and not has_default:
        raise _unset(match[1] or match[3], text, "")
    return f"{before}{found or ''}{_expand_text(text[end:], variable)}"


def _omegaconf_text(default: str, variable: re.Pattern[str]) -> str | None:
    """The default of ``${oc.env:NAME,default}``: blanks and quotes around it are no part of it."""
    text = default.strip()
    if text in ("null", "None"):
        return None
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    return _expand_text(text, variable)


def _unset(name: str, text: str, advice: str) -> ConfigError:
    return ConfigError(
        f"{text!r} names the environment variable {name}, which is not set. Set it or write "
        f"${{{name}:-default}}.{advice}"
    )


def read_datasets(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """The keys of each dataset of a training config, by its name.

    ``config.yaml#NAME`` selects one of several. A config with one dataset names it ``"0"``.
    """
    text = os.fspath(path)
    file, _, name = text.rpartition("#")
    if not file or os.path.exists(text):
        return datasets_of(_read_yaml(path), f"config file {text}")
    found = datasets_of(_read_yaml(file), f"config file {file}")
    if name not in found:
        raise ConfigError(
            f"config file {file} has no dataset {name!r}. It has {', '.join(map(repr, found))}."
        )
    return {name: found[name]}


def datasets_of(document: Mapping[str, Any], where: str = "config") -> dict[str, dict[str, Any]]:
    """Like `read_datasets`, for a document that was already read."""
    document = as_dict(document, where)
    block = _block(document, where)
    has_map = bool({"map_dir", "map_path"} & block.keys())
    if not has_map and {"root", "datasets"} & block.keys():
        named = dict(_of_lists(block, where))
    elif not block.keys() & _OWN_KEYS and block.get("config") is not None:
        outer = {key: value for key, value in block.items() if key not in ("config", "_target_")}
        inner = datasets_of_configs(block["config"], f"{where}, config")
        named = {name: keys | outer for name, keys in inner.items()}
    else:
        named = {"0": _of_keys(block, where)}
    return {name: _referenced(keys, document) for name, keys in named.items()}


def _block(document: dict[str, Any], where: str) -> dict[str, Any]:
    """The keys at the top of a document, or those of its data block."""
    found = [name for name in _BLOCKS if isinstance(document.get(name), Mapping)]
    if document.keys() & {*_OWN_KEYS, "root", "datasets"} or not found:
        if isinstance(document.get("defaults"), Sequence) and not document.keys() & _OWN_KEYS:
            raise ConfigError(
                f"{where} is a Hydra config that is composed of others (defaults:). Write the "
                "whole of it to a file, with your program and --cfg job --resolve, and give that."
            )
        return document
    name = found[0]
    beside = sorted({"cache", "s3_kwargs"} & document.keys() - document[name].keys())
    if beside and document[name].get("config") is None:
        raise ConfigError(
            f"{where} has {' and '.join(beside)} beside {name}:, where the data module would not "
            f"see it. Move it into the block {name}:."
        )
    return as_dict(document[name], name)


def _of_keys(block: dict[str, Any], where: str) -> dict[str, Any]:
    """The keys of a dataset, by their present names."""
    keys = dict(block)
    for old, new in _OLDER_NAMES.items():
        if old in keys:
            if new in keys:
                raise ConfigError(
                    f"{where} has both {new} and {old}, which are the same. Remove {old}."
                )
            keys[new] = keys.pop(old)
    # In electrai's earlier configs random_seed also draws the test set. With the present names,
    # random_seed belongs to the data module, and random_state draws the test set.
    if _OLDER_NAMES.keys() & block.keys() and "random_seed" in keys:
        keys.setdefault("random_state", keys["random_seed"])
    return {key: value for key, value in keys.items() if value != "???"}  # OmegaConf: not given


def datasets_of_configs(configs: Any, where: str = "config") -> dict[str, dict[str, Any]]:
    """The keys of each dataset of one config, or of a list or mapping of them, by name.

    A config is a path or a mapping of keys. In a list the names are the positions.
    """
    if isinstance(configs, (str, os.PathLike)):
        return read_datasets(Path(str(expand(os.fspath(configs)))).expanduser())
    if isinstance(configs, Mapping) and configs and _is_config(configs):
        return datasets_of(configs, where)
    if isinstance(configs, Mapping):
        several: dict[str, Any] = {str(name): one for name, one in configs.items()}
    elif isinstance(configs, Sequence):
        several = {str(number): one for number, one in enumerate(configs)}
    else:
        several = {}
    if not several:
        raise ConfigError(
            f"{where} is empty. Give the path of a training config (`zarrcache init` writes an "
            "example), or several."
        )
    found = {}
    for name, one in several.items():
        inner = datasets_of_configs(one, f"{where} {name}")
        if len(inner) > 1:
            raise ConfigError(
                f"{where} {name} has several datasets itself: {', '.join(map(repr, inner))}. Name "
                f"one of them: {name}#{next(iter(inner))}."
            )
        (found[name],) = inner.values()
    return found


def _is_config(document: Mapping[Any, Any]) -> bool:
    """Whether a mapping is a config, and not one of names to configs."""
    keys = {*_OWN_KEYS, *_BLOCKS, "config", "root", "datasets", "functional", "cache"}
    return bool(document.keys() & {*keys, "dataset_name", "s3_kwargs"})


def _of_lists(block: dict[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The datasets of electrai's block: of ``root``, or of each of ``datasets``."""
    if block.get("datasets") is None:
        specs: Any = [{key: block[key] for key in _SPEC_KEYS & block.keys()}]
    elif block.get("root") is not None:
        raise ConfigError(f"{where} has both root and datasets. Remove one of them.")
    else:
        specs = block["datasets"]
    if isinstance(specs, (str, Mapping)) or not isinstance(specs, Sequence) or not specs:
        raise ConfigError(
            f"{where}: datasets has to be a list of {{root: FILE LIST, split_file: ..., val_frac: "
            "..., dataset_id: ...}."
        )
    rest = {key: value for key, value in block.items() if key not in {"datasets", *_SPEC_KEYS}}
    defaults = {
        key: value
        for key in ("split_file", "val_frac")
        if (value := block.get(f"default_{key}", block.get(key))) is not None
    }
    names = set()
    for number, given in enumerate(specs):
        spec = as_dict(given, "dataset") if hasattr(given, "__dict__") else given
        if not isinstance(spec, Mapping) or not spec.get("root"):
            raise ConfigError(
                f"{where}: dataset {number} has no root, the path of its file list "
                "(mp_filelist.txt)."
            )
        unknown = spec.keys() - _SPEC_KEYS
        if unknown:
            raise ConfigError(
                f"{where}: dataset {number} has the key {min(map(str, unknown))!r}; the keys are "
                f"{', '.join(sorted(_SPEC_KEYS))}."
            )
        own = defaults | {key: value for key, value in spec.items() if value is not None}
        dataset_id = own.pop("dataset_id", number)
        name = str(dataset_id)
        if type(dataset_id) is not int and not name.isdecimal():
            raise ConfigError(
                f"{where}: dataset_id is {dataset_id!r}; it has to be a whole number."
            )
        if name in names:
            raise ConfigError(f"{where}: two datasets have the dataset_id {name}.")
        names.add(name)
        yield name, _of_list(own, rest)


def _of_list(spec: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """The keys of a dataset that a file list describes.

    As electrai keeps them: the densities lie in ``data/`` and ``label/`` beside the list, CHGCARs
    before json.gz files, which it does not read, and are used per volume; without a split file
    there is no test set.
    """
    root = str(expand(os.fspath(spec.pop("root"))))
    if "://" in root:
        raise ConfigError(
            f"root is {root}; a file list is read from this machine. Copy it, and give data_dir "
            "and label_dir, which may be on S3."
        )
    if os.path.isdir(root):
        raise ConfigError(
            f"root is the directory {root}. It has to be the file list in it, for example "
            f"{root.rstrip('/')}/mp_filelist.txt."
        )
    directory = posixpath.dirname(root) or "."
    return {
        **{key: value for key, value in rest.items() if not key.startswith("default_")},
        "data_dir": f"{directory}/data",
        "label_dir": f"{directory}/label",
        "map_dir": root,
        "functional": posixpath.basename(root),
        "normalize_data": "volume",
        "train_fraction": 1.0,
        "source": rest.get("source") or ["zarr", "zarr.zip", "CHGCAR", "json.gz"],
        **spec,
    }


def _referenced(keys: dict[str, Any], document: Mapping[str, Any]) -> dict[str, Any]:
    """Replace references to other keys of the file: ``${paths.data}``."""

    def replaced(value: Any, within: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            return {key: replaced(inner, within) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [replaced(inner, within) for inner in value]
        if not isinstance(value, str):
            return value
        whole = _REFERENCE.fullmatch(value)
        if whole:  # of the type that it has there
            return found(whole[1], within, value)
        return _REFERENCE.sub(lambda match: str(found(match[1], within, match[0])), value)

    def found(name: str, within: tuple[str, ...], text: str) -> Any:
        target: Any = document
        for part in name.split("."):
            if not isinstance(target, Mapping) or part not in target:
                return text  # an environment variable, or an error when variables are expanded
            target = target[part]
        if name in within:
            raise ConfigError(f"{text} refers to itself, through {' and '.join(within)}.")
        return replaced(target, (*within, name))

    return {key: replaced(value, (key,)) for key, value in keys.items()}


def as_dict(value: object, name: str) -> dict[str, Any]:
    """A mapping or namespace as a dict, with the containers of OmegaConf as dicts and lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in _items(value)}
    if hasattr(value, "__dict__") and not isinstance(value, type):
        return {key: plain(inner) for key, inner in vars(value).items()}
    raise ConfigError(f"{name} is {value!r}; it must be a mapping of keys to values.")


def plain(value: Any) -> Any:
    """The containers of OmegaConf in a value as dicts and lists."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in _items(value)}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, tuple)):
        return [plain(inner) for inner in value]
    return value


def _items(mapping: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    try:
        return list(mapping.items())
    except Exception:
        # Hydra has removed the backslash of \\${NAME:-default}, and OmegaConf takes NAME for a
        # resolver of its own.
        omegaconf = sys.modules.get("omegaconf")
        if omegaconf is None or not omegaconf.OmegaConf.is_config(mapping):
            raise
        return list(omegaconf.OmegaConf.to_container(mapping, resolve=False).items())


def _read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    if is_url(path):
        raise ConfigError(
            f"config file {os.fspath(path)} is a URL, and is read from this machine. Copy it here "
            "(`aws s3 cp`) and give its path."
        )
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(
            f"config file {os.fspath(path)} cannot be read ({exc.strerror}). Give the path of a "
            "YAML file; `zarrcache init` writes one."
        ) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(
            f"config file {os.fspath(path)} is not UTF-8 text ({exc.reason} at byte {exc.start}). "
            "Give a YAML file, saved as UTF-8; `zarrcache init` writes one."
        ) from exc
    try:
        document = yaml.load(text, YamlLoader)
    except ConfigError as exc:
        raise ConfigError(f"config file {os.fspath(path)}: {exc}") from None
    except yaml.YAMLError as exc:
        named = str(exc).replace('"<unicode string>"', "the file")
        raise ConfigError(f"config file {os.fspath(path)} is not YAML: {named}") from exc
    except RecursionError:
        raise ConfigError(
            f"config file {os.fspath(path)} has hundreds of lists or mappings in each other. It "
            "has to hold keys and values; `zarrcache init` writes an example."
        ) from None
    if not isinstance(document, dict):
        raise ConfigError(
            f"config file {os.fspath(path)} holds no keys. `zarrcache init` writes an example."
        )
    return document


class YamlLoader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 does, and refuses a key that is written twice.

    PyYAML takes the last of two keys. Its numbers are those of YAML 1.1: ``12:30:00`` is 45000,
    ``042`` is 34, ``1_000`` is 1000, and ``2026-11-30`` is a date. Here they are text, except
    ``042``, which is 42. Numbers of more than 40 digits are text too, which no setting takes for a
    number.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        # Deep: now and not in a later pass, so that each error has its line, and PyYAML refuses an
        # alias of the value that the alias is in.
        try:
            return super().construct_object(node, deep=True)
        except (ConfigError, yaml.YAMLError, RecursionError):
            raise
        except Exception as exc:  # PyYAML's constructors expect a value that fits its tag
            raise ConfigError(
                f"line {node.start_mark.line + 1} has a value that cannot be read "
                f"({safe_repr(exc)}). Write text, a number, true, false, null, a list or a "
                "mapping, without a tag such as !!float."
            ) from exc

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if _NO_TEXT.search(value):
            raise ConfigError(
                f"line {node.start_mark.line + 1} has an escape such as \\0 or \\ud800, which no "
                "path or name can contain. Remove it."
            )
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ConfigError(
                    f"the key {key.value!r} is in line {seen[key.value]} and again in line "
                    f"{line}. Remove one of them."
                )
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                seen[key.value] = line
        return super().construct_mapping(node, deep)


def _text(loader: YamlLoader, node: yaml.ScalarNode) -> str:
    return str(loader.construct_scalar(node))


def _whole(loader: YamlLoader, node: yaml.ScalarNode) -> int | str:
    text = _text(loader, node)
    if len(text) > _MOST_DIGITS:
        return text
    if "x" in text and "_" not in text:
        return int(text, 16)
    return int(text) if text.lstrip("+-").isdecimal() else text


def _decimal(loader: YamlLoader, node: yaml.ScalarNode) -> float | str:
    text = _text(loader, node)
    return text if ":" in text or "_" in text else loader.construct_yaml_float(node)


YamlLoader.add_constructor("tag:yaml.org,2002:int", _whole)
YamlLoader.add_constructor("tag:yaml.org,2002:float", _decimal)
YamlLoader.add_constructor("tag:yaml.org,2002:timestamp", _text)
