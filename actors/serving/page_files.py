"""The files of the page at ``/``. Imports nothing heavy."""

from __future__ import annotations

from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "andes_web"
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}


@cache
def page_files() -> dict[str, tuple[bytes, str]]:
    """Content and media type of each file, by name."""
    return {
        path.name: (path.read_bytes(), KINDS[path.suffix])
        for path in FOLDER.iterdir()
        if path.suffix in KINDS
    }
