"""An extension of mkdocstrings: the lists of fields in docstrings become lists on the page.

Docstrings list fields as `name  text` with two or more spaces between them and further lines indented, which Markdown
would run into one paragraph.
"""

import re
from typing import Any

from griffe import Extension, Object

FIELD = re.compile(r"^(?P<names>\w+(?:, \w+)*) {2,}(?P<text>\S.*)$")


class FieldLists(Extension):
    """Rewrite the docstring of every object that is loaded."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Make each field of a docstring an item of a list."""
        if obj.docstring is not None:
            obj.docstring.value = with_field_lists(obj.docstring.value)


def with_field_lists(text: str) -> str:
    """Return a docstring in which every line `name  text` begins an item, with the indented lines that follow."""
    lines: list[str] = []
    in_item = False
    for line in text.splitlines():
        field = FIELD.match(line)
        if field is not None:
            # A list needs an empty line above it.
            if not in_item and lines and lines[-1]:
                lines.append("")
            lines.append(f"- `{field['names']}`: {field['text']}")
            in_item = True
        elif in_item and line.startswith("  "):
            lines.append(f"  {line.strip()}")
        else:
            in_item = False
            lines.append(line)
    return "\n".join(lines)
