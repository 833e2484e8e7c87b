"""Pages of the documentation site that are made from the code, and from files outside ``docs/``.

A hook of mkdocs (see ``mkdocs.yml``): the README is the front page; configuration and command line
are written from what the program itself says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from zarrcache.cli import _application
from zarrcache.ops import config_schema

ROOT = Path(__file__).parents[1]
#: Files of the repository that are pages, and where.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
}
_LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)]*)?\))")
#: A fence with the name of its file, as GitHub takes it; superfences wants a title.
_NAMED_FENCE = re.compile(r"^```(\w+) ([\w./-]+)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in ``docs/``."""
    for name, place in PAGES.items():
        add(files, config, place, (ROOT / name).read_text(encoding="utf-8"))
    for path in sorted((ROOT / "configs").rglob("*")):
        if path.is_file():
            add(files, config, f"configs/{path.relative_to(ROOT / 'configs')}", path.read_text())
    add(files, config, "reference/configuration.md", "\n".join(configuration()))
    add(files, config, "reference/command-line.md", "\n".join(command_line()))
    return files


def add(files: Files, config: MkDocsConfig, place: str, content: str) -> None:
    """Add a page, or a file to download."""
    files.append(File.generated(config, place, content=content))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files of the repository lead to their pages; show the names of code blocks."""
    source = next((name for name, place in PAGES.items() if place == page.file.src_uri), None)
    here = ROOT / (source or f"docs/{page.file.src_uri}")
    depth = page.file.src_uri.count("/")

    def linked(match: re.Match[str]) -> str:
        target = match[2]
        if "://" in target or target.startswith(("mailto:", "/")):
            return match[0]
        path = Path(here.parent, target).resolve()
        if not path.is_relative_to(ROOT):
            return match[0]
        name = path.relative_to(ROOT).as_posix()
        place = PAGES.get(name, name.removeprefix("docs/"))
        return f"{match[1]}{'../' * depth}{place}{match[3]}"

    return _NAMED_FENCE.sub(r'```\1 title="\2"', _LINK.sub(linked, markdown))


def configuration() -> Iterator[str]:
    """A section per block of the config, a table row per key."""
    schema = config_schema()
    yield "# Configuration\n"
    yield (
        "A training config is a YAML file. zarrcache reads the keys below and ignores others. "
        "`zarrcache init` writes a file with all of them, `zarrcache schema` the JSON schema for "
        "editors. `$VAR`, `${VAR}` and `${VAR:-default}` expand to environment variables.\n"
    )
    yield from block(schema, schema, "")


def block(schema: dict[str, Any], node: dict[str, Any], prefix: str) -> Iterator[str]:
    """The keys of one block, then its inner blocks."""
    yield f"## {f'`{prefix[:-1]}:`' if prefix else 'Data'}\n"
    yield "| key | default | what |\n|---|---|---|"
    inner = []
    for name, key in node["properties"].items():
        comment = [line for line in key.get("description", "").splitlines() if line.strip()]
        last = comment.pop() if comment and comment[-1].startswith(("Default:", "Required")) else ""
        comment = [line.replace("|", "\\|").replace("<", "&lt;") for line in comment]
        text = " ".join(example(line) if line.startswith(" ") else line for line in comment)
        default = last.removeprefix("Default:").strip().rstrip(".").replace("|", "\\|")
        yield f"| `{prefix}{name}` | {default} | {text} |"
        references = [one["$ref"] for one in key.get("anyOf", [key]) if "$ref" in one]
        if references:
            inner.append((f"{prefix}{name}.", schema["$defs"][references[0].rpartition("/")[2]]))
    yield ""
    for path, definition in inner:
        yield from block(schema, definition, path)


def example(line: str) -> str:
    """An indented line of a comment: an example, what it means, and its default, in columns."""
    code, *rest = re.split(r" {3,}", line.strip())
    return f"<br>`{code}` {'; '.join(rest)}"


def command_line() -> Iterator[str]:
    """A section per command, from its own help."""
    group: Any = typer.main.get_command(_application())
    yield "# Commands: every option\n"
    yield (
        "`zarrcache COMMAND --help` says the same in the terminal. Data goes to standard output, "
        "messages to standard error. Exit codes: 0 done, 1 some failed, 2 wrong command or "
        "config.\n"
    )
    for name, command in group.commands.items():
        context = typer.Context(
            command, info_name=f"zarrcache {name}", terminal_width=96, max_content_width=96
        )
        yield f"## {name}\n"
        yield f"```text\n{command.get_help(context).strip()}\n```\n"
