"""FIITED's benchmark: the page from kept pieces, and row lengths by popularity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.bench.fiited import figures, quality
from raysys.errors import DataError
from raysys.training.fiited import FiitedConfig
from raysys.training.fiited.baselines import build
from raysys.training.fiited.models import DLRM
from raysys.training.fiited.progressive import run
from raysys.training.fiited.stream import PlantedStream, StreamConfig


def piece(folder: Path, name: str, key: dict[str, Any], result: Any) -> None:
    (folder / f"fiited-{name}.json").write_text(json.dumps({"key": key, "result": result}))


def planted(method: str, ratio: float, seed: int, late: float, **fields: Any) -> dict[str, Any]:
    key = {"signal": "weak", "seed": seed, "method": method, "ratio": ratio, "gamma": 0.9,
           "utility": "freq_grad", "full_stream": False} | fields  # fmt: skip
    found = {"late": late, "bytes": 1e6 * (2 - ratio), "curve": [0.6, 0.7, 0.5, late]}
    if method == "chunks":
        found["lengths_by_popularity"] = [[seed, 2, 4 - seed]] * len(quality.BANDS)
    return {"key": key, "result": found}


def test_the_page_shows_all_methods_of_the_kept_pieces(tmp_path: Path) -> None:
    given = [("full", 0.0, 0), ("chunks", 0.95, 0), ("chunks", 0.95, 1), ("rows", 0.95, 0)]
    runs = [planted(method, ratio, seed, 0.7 + 0.01 * seed) for method, ratio, seed in given]
    runs.append(planted("chunks", 0.95, 0, 0.6, gamma=1.0))
    for index, one in enumerate(runs):
        piece(tmp_path, str(index), one["key"], one["result"])
    piece(tmp_path, "speed", {"rows": 3}, 7.0)
    movie = {"method": "chunks", "ratio": 0.9, "seed": 0}
    piece(tmp_path, "movie", movie, {"auc": 0.78, "bytes": 5e5})
    target = tmp_path / "page.html"
    assert figures.main([str(tmp_path), str(target)]) == 0
    page = target.read_text()
    for text in ("AUC against bytes", "Row lengths by popularity, 95%", "Drift", "MovieLens"):
        assert text in page
    rows = [r for r in figures.load(str(tmp_path)) if r["signal"] == "weak"]
    lines = figures.drift_plot(rows).figure.axes[0].get_lines()
    assert [line.get_label() for line in lines][:4] == [
        "full width", "FIITED, gamma 0.9", "FIITED, gamma 1", "whole rows",
    ]  # fmt: skip
    assert lines[1].get_ydata()[-1] == pytest.approx(0.705)
    assert figures.by_method([r for r in rows if r["gamma"] == 0.9])["chunks"] == [
        (0.95, pytest.approx(1.05), pytest.approx(0.705))
    ]
    assert figures.main([str(tmp_path)]) == 2
    with pytest.raises(DataError, match="no runs"):
        figures.load(str(tmp_path / "none"))


def test_bytes_of_a_method_without_an_index_are_its_weights_and_buffers() -> None:
    """No rounding to pages: rivals must not look larger than they need to be."""
    config = FiitedConfig(chunk=4, budget_ratio=0.0)
    small, large = (build("full", (rows, 20), 16, 0.0, config) for rows in (1000, 3000))
    assert large.bytes() - small.bytes() == 2000 * (16 * 4 + 4)
    assert build("hashing", (1000, 20), 16, 0.9, config).bytes() < small.bytes()


def test_lengths_by_popularity_count_every_id_once() -> None:
    config = StreamConfig(rows=(400, 200), batch=64, steps=30, swap_at=0)
    settings = FiitedConfig(chunk=4, budget_ratio=0.5, interval=5)
    embedding, stream = build("chunks", config.rows, 16, 0.9, settings), PlantedStream(config)
    run(stream, embedding, DLRM(2, 16))
    counts = np.array(quality._lengths_by_popularity(embedding, stream))
    assert counts.sum() == 600
    assert counts[:, 1:].sum() == embedding.bag(0).store.engine.counters()["rows"]
    means = counts @ np.arange(5) / np.maximum(counts.sum(axis=1), 1)
    assert means[-1] < means[:4].max()  # the tail's rows are shorter than the head's
