"""Show the examples of docstrings (``>>> ...``) as code, on the documentation site.

An extension of griffe, which reads the docstrings for mkdocstrings (see ``mkdocs.yml``).
"""

from __future__ import annotations

import re
from typing import Any

import griffe

#: A prompt, its continuation, and lines of output up to an empty line.
_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


class FenceExamples(griffe.Extension):
    """Puts each example into a block of code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
