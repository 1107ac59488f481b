"""A click model behind Ray Serve: JSON rows in, probabilities out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from raysys.errors import ConfigError, DataError, RaysysError, StorageError
from raysys.training.fiited.clicks import Schema, encode_columns
from raysys.training.fiited.models import DLRM, DeepFM
from raysys.training.fiited.packed import PackedTable

MAX_ROWS = 10_000


class ClickModel:
    """An exported model: packed tables and the dense net.

    Raises:
        StorageError, DataError: the folder is missing or damaged.
    """

    def __init__(self, folder: str) -> None:
        root = Path(folder)
        try:
            facts = json.loads((root / "model.json").read_text(encoding="utf-8"))
        except OSError as error:
            raise StorageError(str(root), "no model.json", "Run `raysys embed export`") from error
        except ValueError:
            raise DataError(str(root / "model.json"), "not JSON", "Export again") from None
        columns = facts["columns"]
        self.schema = Schema("", tuple(columns["categorical"]), tuple(columns["dense"]))
        self.tables = PackedTable(root / "tables")
        made = DLRM if facts["model"] == "dlrm" else DeepFM
        self.net: nn.Module = made(
            len(self.schema.categorical), facts["dim"], len(self.schema.dense), facts["hidden"]
        )
        self.net.load_state_dict(torch.load(root / "dense.pt", weights_only=True))
        self.net.eval()

    def score(self, rows: list[dict[str, Any]]) -> list[float]:
        """Probability of a click for each row; an absent column counts as missing.

        Raises:
            DataError: a column of a wrong type, or one that the model does not know.
        """
        names = (*self.schema.categorical, *self.schema.dense)
        unknown = sorted({name for row in rows for name in row} - set(names))
        if unknown:
            raise DataError("request", f"unknown columns {unknown}", "Send " + ", ".join(names))
        columns = {name: [row.get(name) for row in rows] for name in names}
        clicks = encode_columns(self.schema, columns, len(rows))
        with torch.no_grad():
            vectors = torch.from_numpy(self.tables.lookup(clicks.ids))
            dense = torch.from_numpy(clicks.dense) if clicks.dense.shape[1] else None
            logits = self.net(vectors, dense)
        return [float(p) for p in np.asarray(torch.sigmoid(logits))]


class ScoringEndpoint:
    """POST {"rows": [{column: value}]} gives {"scores": [...]}; GET tells the columns."""

    def __init__(self, folder: str) -> None:
        torch.set_num_threads(1)
        self._model = ClickModel(folder)

    async def __call__(self, request: Any) -> Any:
        """Answer one request of Starlette's kind."""
        from starlette.responses import JSONResponse

        if request.method == "GET":
            schema = self._model.schema
            return JSONResponse({"categorical": schema.categorical, "dense": schema.dense})
        status, answer = self.answer(await request.body())
        return JSONResponse(answer, status_code=status)

    def answer(self, body: bytes) -> tuple[int, dict[str, Any]]:
        """HTTP status and JSON answer of a POST body."""
        try:
            return 200, {"scores": self._model.score(_rows(body))}
        except RaysysError as error:
            return 400, {"error": str(error)}


def _rows(body: bytes) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = json.loads(body)["rows"]
    except (ValueError, KeyError, TypeError):
        raise DataError("request", 'not {"rows": [...]}', "Send JSON rows") from None
    fine = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    if not fine or not 1 <= len(rows) <= MAX_ROWS:
        raise ConfigError("rows", type(rows).__name__, f"1 to {MAX_ROWS} objects")
    return rows


def build_application(folder: str, replicas: int = 1) -> Any:
    """The Ray Serve application; the model is opened once here, so that errors come early.

    Raises:
        StorageError, DataError: the model cannot be used.
    """
    from ray import serve

    ClickModel(folder)
    deployment = serve.deployment(
        ScoringEndpoint, num_replicas=replicas, ray_actor_options={"num_cpus": 1}
    )
    return deployment.bind(folder)
