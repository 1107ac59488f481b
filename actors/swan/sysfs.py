"""Small readers of sysfs and procfs files below any root; what is absent reads as None."""

from __future__ import annotations

from pathlib import Path

MOST_CPUS = 4096


def text(path: Path) -> str | None:
    """Stripped content of a file, or None where it is missing, refused or not text."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def number(path: Path) -> float | None:
    """A number in a file; hexadecimal with 0x is understood."""
    found = text(path)
    if not found:
        return None
    try:
        return float(int(found, 16)) if found.lower().startswith("0x") else float(found)
    except ValueError:
        return None


def cpu_list(found: str | None) -> tuple[int, ...]:
    """Ids of a list such as ``0-3,8``; malformed parts are left out."""
    ids: set[int] = set()
    for part in (found or "").split(","):
        low, dash, high = part.strip().partition("-")
        if low.isdigit() and (high.isdigit() or not dash):
            last = min(int(high or low), MOST_CPUS)
            ids.update(range(int(low), last + 1))
    return tuple(sorted(ids))


def folders(parent: Path, pattern: str) -> list[Path]:
    """Entries that match, in order of name; an unreadable parent has none."""
    try:
        return sorted(parent.glob(pattern))
    except OSError:
        return []
