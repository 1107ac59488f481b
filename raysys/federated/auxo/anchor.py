"""The anchor of a split: how a client without a label finds its part in one participation.

Updates can be compared only if they start from the same weights. So a split keeps the weights that
its last round started from, and the centroids of that round's updates. A newcomer trains those
weights once, like any participant, and its update falls to the nearest centroid. Ours: the paper
sends newcomers to random cohorts, and every wrong one costs a participation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.federated.auxo.clustering import NONE

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
REACH = 2.5


@dataclasses.dataclass(frozen=True, slots=True)
class AnchorView:
    """One model's part: mean sketch [D], basis [D, d], centroids of the parts [K, d], and how far
    from them their own clients usually are, [K]."""

    mean: FloatArray
    basis: FloatArray
    centroids: FloatArray
    reach: FloatArray

    def place(
        self, sketch_nD: FloatArray, closed_nK: npt.NDArray[np.bool_] | None = None
    ) -> tuple[IntArray, IntArray]:
        """Nearest part of each update and the next one, int64 [n] each.

        Args:
            closed_nK: parts that have refused a client and are left out.

        Returns:
            NONE for whom the nearest part is out of reach; and NONE for a next part out of reach.
        """
        centred = sketch_nD - self.mean
        length = np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
        points = (centred / length) @ self.basis
        gaps = np.linalg.norm(points[:, None] - self.centroids[None], axis=2)
        if closed_nK is not None:
            gaps = np.where(closed_nK, np.inf, gaps)
        order = gaps.argsort(axis=1, kind="stable")
        inside = np.take_along_axis(gaps <= self.reach, order, axis=1)
        first, second = (np.where(inside[:, k], order[:, k], NONE) for k in (0, 1))
        return first, np.where(first >= 0, second, NONE)


def anchor_view(
    sketch_nD: FloatArray,
    units_nD: FloatArray,
    labels_n: IntArray,
    basis: FloatArray,
    parts: int,
) -> AnchorView:
    """What a round's labelled updates leave behind; every part must have some."""
    points = units_nD @ basis
    centroids = np.stack([points[labels_n == part].mean(axis=0) for part in range(parts)])
    gaps = [
        np.linalg.norm(points[labels_n == part] - centroids[part], axis=1) for part in range(parts)
    ]
    reach = np.array([REACH * np.median(gap) for gap in gaps])
    return AnchorView(sketch_nD.mean(axis=0), basis.copy(), centroids, reach)


@dataclasses.dataclass(slots=True)
class Anchor:
    """The frozen line of a cohort that split, and what its models' updates looked like."""

    line: Any
    views: dict[int, AnchorView]

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The views as arrays; the line is kept with its cohort."""
        views = {
            f"view{model}.{field.name}": getattr(view, field.name)
            for model, view in self.views.items()
            for field in dataclasses.fields(view)
        }
        return {"models": np.array(list(self.views), dtype=np.int64), **views}


def views_from(state: Mapping[str, npt.NDArray[Any]]) -> dict[int, AnchorView]:
    """The views of :meth:`Anchor.state`."""
    return {
        model: AnchorView(
            *(np.array(state[f"view{model}.{f.name}"]) for f in dataclasses.fields(AnchorView))
        )
        for model in state["models"].tolist()
    }
