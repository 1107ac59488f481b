"""Data sets that come with their clients: speakers of plays, raters of films, and LEAF's files.

Each loader gives arrays and the client key of every sample, for the natural partition; any other
partition works on them as well. Text becomes whole numbers, one per character.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.errors import DataError
from raysys.federated.core.datasets import FederatedData, must_exist, split
from raysys.federated.core.randomness import Purpose, generator

IntArray = npt.NDArray[np.int64]
MIDDLE_RATING = 3.5
GENRES = 3
# The alphabet of LEAF's Shakespeare task, in its order (leaf/models/utils/language_utils.py).
LEAF_LETTERS = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"


def load_shakespeare_data(
    path: Path,
    seed: int = 0,
    context: int = 10,
    min_characters: int = 1000,
    per_client: int | None = None,
    one_hot: bool = False,
) -> FederatedData:
    """Next-character prediction, one client per speaker; a fifth of the samples is held out.

    Speeches are blocks between empty lines whose first line is a name of at most 40 characters
    and a colon. Inputs are the ``context`` characters before each one, int64 [N, context].

    Args:
        min_characters: speakers with fewer are left out. per_client: a seeded choice of so many
            samples of each speaker; None takes all (about a million).
        one_hot: inputs as float32 [N, context * alphabet], for plain MLPs; wants ``per_client``.

    Raises:
        CapabilityError: no such file. DataError: no speaker says enough.
    """
    must_exist(path)
    speeches = _speeches(path.read_text(encoding="utf-8"))
    texts = {name: text for name, text in speeches.items() if len(text) >= min_characters}
    if not texts:
        raise DataError(str(path), f"no speaker has {min_characters} characters", "Lower it")
    alphabet = sorted(set("".join(texts.values())))
    code = {letter: number for number, letter in enumerate(alphabet)}
    rng = generator(seed, Purpose.SPLIT, 1)
    inputs, targets, keys = [], [], []
    for number, name in enumerate(sorted(texts)):
        line = np.array([code[letter] for letter in texts[name]], dtype=np.int64)
        ends = np.arange(context, len(line))
        if per_client is not None:
            ends = np.sort(rng.choice(ends, min(per_client, len(ends)), replace=False))
        inputs.append(line[ends[:, None] + np.arange(-context, 0)])
        targets.append(line[ends])
        keys.append(np.full(len(ends), number))
    tokens = np.concatenate(inputs)
    size = len(alphabet)
    eye = np.eye(size, dtype=np.float32)
    return split(
        "shakespeare",
        eye[tokens].reshape(len(tokens), -1) if one_hot else tokens,
        np.concatenate(targets),
        size,
        max(1, len(tokens) // 5),
        seed,
        np.concatenate(keys),
        vocabulary=0 if one_hot else size,
    )


def load_movielens_data(folder: Path, seed: int = 0) -> FederatedData:
    """Ratings of films, one client per user: predict the rating less 3.5 from film and genres.

    Inputs are int64 [N, 4]: the film, and its first genres (the last one repeated where there are
    fewer than three), as numbers of one vocabulary, for an embedding bag.

    Raises:
        CapabilityError: no such files. DataError: a rating of an unknown film, or no number.
    """
    films: dict[str, list[int]] = {}
    vocabulary: dict[str, int] = {}
    for row in _rows(folder / "movies.csv", ("movieId", "genres")):
        names = row["genres"].split("|")[:GENRES]
        names += [names[-1]] * (GENRES - len(names))
        own = [f"film {row['movieId']}", *(f"genre {name}" for name in names)]
        films[row["movieId"]] = [vocabulary.setdefault(word, len(vocabulary)) for word in own]
    inputs, targets, keys = [], [], []
    path = folder / "ratings.csv"
    for row in _rows(path, ("userId", "movieId", "rating")):
        try:
            inputs.append(films[row["movieId"]])
            targets.append(float(row["rating"]) - MIDDLE_RATING)
            keys.append(int(row["userId"]))
        except (KeyError, ValueError) as error:
            raise DataError(str(path), f"row {len(keys) + 2} is wrong ({error})", "") from error
    return split(
        "movielens",
        np.array(inputs, dtype=np.int64),
        np.array(targets, dtype=np.float32)[:, None],
        0,
        max(1, len(targets) // 5),
        seed,
        np.array(keys),
        vocabulary=len(vocabulary),
    )


def load_leaf_data(path: Path, seed: int = 0) -> FederatedData:
    """LEAF's JSON (``users``, ``user_data`` with ``x`` and ``y``), one client per user.

    ``path`` is a file, or a folder with folders ``train`` and ``test`` of such files.

    Strings are read as LEAF's Shakespeare task does, number lists as they are (FEMNIST's pixels).

    Raises:
        CapabilityError: nothing there. DataError: not LEAF's layout, or samples of unlike shape.
    """
    if not path.is_dir():
        inputs, targets, keys = _leaf_arrays([path])
        held_out = max(1, len(targets) // 5)
        return split(
            path.stem, inputs, targets, int(targets.max()) + 1, held_out, seed, keys,
            vocabulary=_leaf_vocabulary(inputs),
        )  # fmt: skip
    inputs, targets, keys = _leaf_arrays(
        sorted((path / "train").glob("*.json")) or [path / "train"]
    )
    test_inputs, test_targets, _ = _leaf_arrays(
        sorted((path / "test").glob("*.json")) or [path / "test"]
    )
    return FederatedData(
        name=path.name,
        inputs=inputs,
        targets=targets,
        test_inputs=test_inputs,
        test_targets=test_targets,
        classes=int(max(targets.max(), test_targets.max())) + 1,
        keys=keys,
        vocabulary=_leaf_vocabulary(inputs),
    )


def load_client_csv(path: Path, n_samples: int) -> npt.NDArray[np.str_]:
    """Client of each sample from a table with columns ``client`` and ``index`` (row of the sample).

    Returns:
        Keys for the natural partition, one per sample.

    Raises:
        DataError: a sample without a client or with two, or a row that does not exist.
    """
    owner: dict[int, str] = {}
    for row in _rows(path, ("client", "index")):
        try:
            index = int(row["index"])
        except ValueError as error:
            raise DataError(str(path), f"index {row['index']!r} is no number", "") from error
        if not 0 <= index < n_samples or index in owner:
            raise DataError(str(path), f"sample {index} is unknown or listed twice", "Correct it")
        owner[index] = row["client"]
    if len(owner) != n_samples:
        raise DataError(str(path), f"names {len(owner)} of {n_samples} samples", "Name them all")
    return np.array([owner[index] for index in range(n_samples)])


def _speeches(text: str) -> dict[str, str]:
    """All that each speaker says, speeches joined by a newline."""
    found: dict[str, list[str]] = {}
    for block in text.split("\n\n"):
        head, _, body = block.strip().partition("\n")
        if head.endswith(":") and len(head) <= 40 and body:
            found.setdefault(head[:-1], []).append(body)
    return {name: "\n".join(parts) for name, parts in found.items()}


def _rows(path: Path, columns: tuple[str, ...]) -> Iterable[dict[str, str]]:
    must_exist(path)
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = set(columns) - set(reader.fieldnames or ())
        if missing:
            raise DataError(str(path), f"has no column {sorted(missing)}", f"It needs {columns}")
        yield from reader


def _leaf_arrays(files: list[Path]) -> tuple[npt.NDArray[Any], IntArray, npt.NDArray[Any]]:
    xs: list[Any] = []
    ys: list[Any] = []
    keys: list[str] = []
    for file in files:
        must_exist(file)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            for user in content["users"]:
                own = content["user_data"][user]
                check = len(own["x"]) == len(own["y"])
                if not check:
                    raise DataError(str(file), f"user {user} has unlike x and y", "Correct it")
                xs += own["x"]
                ys += own["y"]
                keys += [str(user)] * len(own["y"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                str(file), f"is not LEAF's JSON ({error})", "See LEAF's docs"
            ) from error
    try:
        if xs and isinstance(xs[0], str):
            return _letters(xs), _letters(ys)[:, 0], np.array(keys)
        return np.array(xs, dtype=np.float32), np.array(ys, dtype=np.int64), np.array(keys)
    except (ValueError, TypeError, IndexError) as error:
        raise DataError(str(files[0]), f"has samples of unlike shape ({error})", "") from error


def _letters(texts: list[str]) -> IntArray:
    """Strings of one length as numbers; letters outside LEAF's alphabet count as its last one."""
    code = {letter: number for number, letter in enumerate(LEAF_LETTERS)}
    return np.array([[code.get(c, len(code) - 1) for c in text] for text in texts], dtype=np.int64)


def _leaf_vocabulary(inputs: npt.NDArray[Any]) -> int:
    return len(LEAF_LETTERS) if np.issubdtype(inputs.dtype, np.integer) else 0
