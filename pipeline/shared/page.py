"""Pages that people open in a browser: each one file in the same look, which loads nothing and runs its own script."""

import base64
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jinja2

_SHARED = Path(__file__).with_name("page")


def rendered(page: Path, data: Any, **values: Any) -> bytes:
    """The page of the template `page`.html.jinja, which extends page.html.jinja, with `page`.css and `page`.js.

    `data` is what its script reads; `values` are what its template names.
    """
    style, script = (
        "".join(path.with_suffix(end).read_text(encoding="utf-8") for path in (_SHARED, page))
        for end in (".css", ".js")
    )
    sha256 = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    template = _templates(page.parent).get_template(f"{page.name}.html.jinja")
    text = template.render(style=style, script=script, script_sha256=sha256, data=data, **values)
    return text.encode("utf-8", "replace")


@functools.cache
def _templates(folder: Path) -> jinja2.Environment:
    """It keeps what it compiled: a trainer writes its page with every checkpoint."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, _SHARED.parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["json"] = json.dumps
    return templates


def data_uri(jpeg: bytes) -> str:
    """A JPEG as text that an HTML page can show without a file."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode('ascii')}"
