"""README.md of what was made: Markdown whose head the hub reads, and at whose end stands what is the user's."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from pipeline.shared.files import AnyPath, write
from schemas.shard import CARD

_YOURS = "<!-- What stands below this line is yours: it stays when the card is written anew. -->"
_TEMPLATES = jinja2.Environment(
    autoescape=False,  # noqa: S701  # it is Markdown; what strangers wrote is not in it
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_compiled = functools.cache(_TEMPLATES.from_string)


def write_readme(folder: AnyPath, template: Path, head: Mapping[str, Any], **values: Any) -> None:
    """Write `folder`/README.md: the `head` for the hub, and what a template of Markdown says of the `values`.

    What the user added stays, and a README.md that is none of ours is left alone.

    Raises:
        OSError: when it cannot be read or written.
    """
    path = folder / CARD
    before = path.read_bytes().decode("utf-8", "replace") if path.exists() else _YOURS
    _, ours, yours = before.partition(_YOURS)
    if ours:
        plain = json.loads(json.dumps(head))  # what occurs twice in one object would be written as a reference
        lines = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)
        text = _compiled(template.read_text(encoding="utf-8")).render(json=json.dumps, **values)
        write(path, f"---\n{lines}---\n\n{text}\n{_YOURS}{yours or chr(10)}".encode())


def with_text_of(page: str, card: str) -> str:
    """The `card`, with what its owner added to another copy of it (`page`), unless the card has such text itself."""
    head, line, yours = card.partition(_YOURS)
    theirs = page.partition(_YOURS)[2]
    return head + line + theirs if line and theirs and theirs.startswith(yours.rstrip()) else card
