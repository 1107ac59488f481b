"""Which jobs there are, read from the files without importing them."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A program that can be run as ``python -m jobs.<name>``."""

    name: str
    help: str


def find_jobs(app_root: Path) -> list[Entry]:
    """List the programs in ``<app_root>/jobs``, sorted by name.

    A program is ``jobs/NAME.py`` with a main guard, or ``jobs/NAME/__main__.py``; its help is the
    first line of its docstring.
    """
    folder = app_root / "jobs"
    files = {path.stem: path for path in folder.glob("[a-z]*.py")}
    files |= {path.parent.name: path for path in folder.glob("[a-z]*/__main__.py")}
    entries = []
    for name, path in sorted(files.items()):
        text = path.read_text(encoding="utf-8")
        if '__name__ == "__main__"' in text:
            lines = (ast.get_docstring(ast.parse(text)) or "").splitlines()
            entries.append(Entry(name=name, help=lines[0] if lines else ""))
    return entries
