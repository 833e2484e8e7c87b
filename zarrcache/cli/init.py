"""``zarrcache init`` and ``zarrcache schema``: a config to begin with, and its JSON schema."""

from __future__ import annotations

import functools
import json
import operator
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from zarrcache.cli.app import command, say, show
from zarrcache.cli.options import check_output, output_file, string
from zarrcache.errors import ConfigError

__all__ = ["init", "schema"]


@command(resumable=False)
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="file to write")] = Path(
        "zarrcache.yaml"
    ),
    data_dir: Annotated[
        str | None, string("TEXT", "directory or s3:// URL of the input densities")
    ] = None,
    label_dir: Annotated[
        str | None, string("TEXT", "directory or s3:// URL of the label densities")
    ] = None,
    map_dir: Annotated[str | None, string("TEXT", "map file of functionals and ids")] = None,
    functional: Annotated[
        str | None, string("TEXT", "functional to train on, for example GGA")
    ] = None,
    cache_dir: Annotated[
        str | None, string("TEXT", "directory of the cache, on this node's own disk")
    ] = None,
    limit: Annotated[
        str | None, string("TEXT", "bytes that the cache may use, for example '200 GiB'")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="do not ask; settings not given keep their defaults")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="replace FILE if it exists")] = False,
) -> int:
    """Write a commented config; asks for the main values."""
    import yaml

    from zarrcache.config import DataConfig
    from zarrcache.disk import write_file
    from zarrcache.ops import filled_in, key_comments, sample

    if os.path.isfile(path) and not force:
        raise ConfigError(f"{path} exists. Give another name, or --force to replace it.")
    check_output(path, "a config", b"")
    text = sample()
    values = {
        "data_dir": data_dir,
        "label_dir": label_dir,
        "map_dir": map_dir,
        "functional": functional,
        "cache.dir": cache_dir,
        "cache.limit": limit,
    }
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError("There is no terminal to ask on. Give --yes, and values as options.")
        document = yaml.safe_load(text)
        comments = key_comments(text)
        for key, value in values.items():
            if value is None:
                parts = tuple(key.split("."))
                default = str(functools.reduce(operator.getitem, parts, document))
                say(comments[parts].partition("\n")[0])
                values[key] = typer.prompt(key, default=default, err=True)
    name = shlex.quote(str(path))
    text = filled_in(text, values)
    if str(path).isprintable():  # a line break would end the comment
        text = text.replace('"configs/s3_cached.yaml"', json.dumps(str(path), ensure_ascii=False))
        text = text.replace("configs/s3_cached.yaml", name)
    config = DataConfig.of(yaml.safe_load(text))  # an error names the key
    write_file(path, text.encode())
    steps = [f"zarrcache doctor {name}", f"zarrcache warm {name}"]
    if not Path(config.map_dir).expanduser().exists():
        places = " ".join(map(shlex.quote, dict.fromkeys((config.data_dir, config.label_dir))))
        map_file, functional = shlex.quote(config.map_dir), shlex.quote(config.functional)
        steps.insert(0, f"zarrcache map {places} -o {map_file} --functional {functional}")
    say(f"wrote {path}. Next: {', then '.join(steps)}")
    return 0


@command(resumable=False)
def schema(
    output: Annotated[Path | None, output_file("file to write [default: standard output]")] = None,
) -> int:
    """Print the JSON schema of a config, for editors."""
    from zarrcache.disk import write_file
    from zarrcache.ops import config_schema

    text = json.dumps(config_schema(), indent=2)
    if output is None:
        show(text)
        return 0
    check_output(output, "a JSON schema", b'{\n  "$schema"')
    write_file(output, f"{text}\n".encode())
    say(
        f"wrote {output}. As the first line of a config: "
        f"# yaml-language-server: $schema={output.absolute().as_uri()}"
    )
    return 0
