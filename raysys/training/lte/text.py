"""Text to train and evaluate on: documents, their fixed split, and blocks of tokens.

Two corpora need no download: the documentation inside Python itself (language reference and the
docstrings of the standard library, one document per topic or module; always there), and the
plays of Tiny Shakespeare where the optional data are. Splits are by document, never by line.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysys.training.lte.config import require
from raysys.training.lte.errors import LTEDataError

CORPORA = ("python", "shakespeare", "folder")
HELD_OUT = 10  # one document of ten
BYTE_VOCABULARY = 256
Tokenise = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents for training and held-out documents."""

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What a step computes on.

    Args:
        inputs: keyword arguments of the model's forward pass.
        labels: int64; [B, S] for language models (the loss shifts them), [B] for classes.
        valid: bool [B, S], tokens that count in the router's losses; None counts all.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    valid: Tensor | None = None


def corpus(name: str, folder: Path | None = None) -> Corpus:
    """Load a corpus.

    Args:
        name: ``"python"``, ``"shakespeare"`` (needs ``folder`` to be the data folder) or
            ``"folder"`` (every ``*.txt`` below ``folder`` is a document).

    Raises:
        LTEConfigError: unknown name.
        LTEDataError: the text is missing or too short to split.
    """
    require("corpus", name, name in CORPORA, f"one of {CORPORA}")
    if name == "python":
        return _split(name, _python_documents())
    if folder is None or not folder.is_dir():
        raise LTEDataError(str(folder), "no such folder", "Set RAYSYS_DATA, or use corpus=python")
    if name == "shakespeare":
        return _plays(folder / "tinyshakespeare" / "input.txt")
    files = sorted(folder.rglob("*.txt"))
    return _split(name, {str(p.relative_to(folder)): _read(p) for p in files})


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LTEDataError(str(path), f"cannot be read ({error})", "Give UTF-8 text") from error


def _split(name: str, documents: dict[str, str]) -> Corpus:
    """Documents whose name's digest ends in zero (of ten) are held out: stable as others come."""
    held: list[str] = []
    train: list[str] = []
    for title, text in sorted(documents.items()):
        digest = int(hashlib.sha256(title.encode()).hexdigest(), 16)
        (held if digest % HELD_OUT == 0 else train).append(text)
    if not held or not train:
        reason = f"{len(documents)} documents do not split into training and held-out ones"
        raise LTEDataError(name, reason, "Give more documents")
    return Corpus(name, tuple(train), tuple(held))


def _plays(path: Path) -> Corpus:
    """The file is plays one after another without marks: the last tenth, other plays, is held
    out.
    """
    text = _read(path)
    cut = text.rfind("\n\n", 0, int(len(text) * (1 - 1 / HELD_OUT)))
    return Corpus("shakespeare", (text[:cut],), (text[cut:],))


def _python_documents() -> dict[str, str]:
    import pydoc_data.topics as reference

    documents = {f"topic {title}": text for title, text in reference.topics.items()}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = "\n\n".join(_docstrings(path))
        if len(text) > 500:
            documents[f"module {path.stem}"] = text
    return documents


def _docstrings(path: Path) -> list[str]:
    tree = ast.parse(path.read_bytes())
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in found if text]


def to_bytes(text: str) -> list[int]:
    """UTF-8 bytes as tokens."""
    return list(text.encode())


class TokenBlocks:
    """Equal blocks of consecutive tokens, in a random order that depends on seed and step only.

    Args:
        tokens: int [N]; the rest that fills no block is left out.
        length: tokens per block.
    """

    def __init__(self, tokens: NDArray[Any], length: int) -> None:
        require("seq_len", length, length >= 2, "at least 2")
        count = len(tokens) // length
        if count == 0:
            reason = f"{len(tokens)} tokens are less than one block of {length}"
            raise LTEDataError("text", reason, "Give more text or a smaller seq_len")
        self.blocks = torch.from_numpy(np.asarray(tokens[: count * length], np.int64))
        self.blocks = self.blocks.reshape(count, length)

    @classmethod
    def encode(cls, texts: Sequence[str], tokenise: Tokenise, length: int) -> TokenBlocks:
        """Tokenise documents one after the other."""
        parts = [np.asarray(tokenise(text), np.int64) for text in texts]
        return cls(np.concatenate(parts) if parts else np.zeros(0, np.int64), length)

    def __len__(self) -> int:
        return len(self.blocks)

    def rows(self, step: int, batch: int, seed: int) -> NDArray[np.int64]:
        """Blocks of a step: a walk through a new permutation in every epoch."""
        if batch > len(self):
            reason = f"{len(self)} blocks are less than a batch of {batch}"
            raise LTEDataError("text", reason, "Give more text or a smaller batch")
        epoch, position = divmod(step, len(self) // batch)
        order = np.random.default_rng((seed, epoch)).permutation(len(self))
        return order[position * batch : (position + 1) * batch]

    def batch(self, step: int, batch: int, seed: int, rank: int = 0, world: int = 1) -> Batch:
        """The part of step ``step``'s batch that belongs to a rank."""
        ids = self.blocks[self.rows(step, batch, seed)[rank::world]]
        return Batch({"input_ids": ids}, ids)

    def all_batches(self, batch: int, limit: int | None = None) -> list[Batch]:
        """Every block once, in order, at most ``limit`` of them."""
        blocks = self.blocks[:limit]
        return [Batch({"input_ids": part}, part) for part in torch.split(blocks, batch)]
