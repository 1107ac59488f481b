"""D2 pruning (Maharana et al., ICLR 2024): difficulty spread over a k-NN graph, diversity back.

The released version builds dense N x N distances; here the neighbours come from blocked products
and the greedy choice from a heap with lazy updates.
"""

from __future__ import annotations

import dataclasses
import heapq

import numpy as np
import torch
from numpy.typing import NDArray

from raysys.config import check_range
from raysys.errors import InfeasibleError
from raysys.training.ccs.baselines.method import check_budget, ids_of
from raysys.training.ccs.table import ScoreTable


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class D2Pruning:
    """D2 pruning.

    Args:
        score: difficulty, scaled to [0, 1] here (message passing needs non-negative values).
        neighbours: size of each neighbourhood.
        gamma: strength of the reverse messages, in [0, 1].
        beta: share of the hardest by AUM that is cut first.
        bandwidth: unit of distance in ``exp(-d / bandwidth)``; None takes the median neighbour
            distance, so that the messages do not depend on the scale of the features.
    """

    score: str = "forgetting"
    neighbours: int = 5
    gamma: float = 0.1
    beta: float = 0.0
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        check_range(self, "neighbours", 1)
        check_range(self, "gamma", 0, 1)
        check_range(self, "beta", 0, 1, high_open=True)

    def select(self, table: ScoreTable, m: int, seed: int) -> NDArray[np.int64]:
        check_budget(table, m)
        pool = np.arange(len(table))
        if self.beta > 0:
            order = np.lexsort((table.ids, -table.hardness("aum")))
            pool = order[int(self.beta * len(table) + 1e-9) :]
        if m > len(pool):
            reason = f"beta={self.beta:g} leaves {len(pool)}"
            raise InfeasibleError(f"a coreset of {m}", reason, "Lower beta")
        table = table.take(np.sort(pool))
        score = table.hardness(self.score)
        spread = float(score.max() - score.min())
        scaled = (score - score.min()) / spread if spread > 0 else np.ones_like(score)
        near, distance = nearest_neighbours(table.need_features("D2Pruning"), self.neighbours)
        unit = self.bandwidth or float(np.median(distance)) or 1.0
        message = scaled + (np.exp(-distance / unit) * scaled[near]).sum(1)
        return ids_of(table, self._greedy(message, near, distance / unit, m))

    def _greedy(
        self,
        score: NDArray[np.float64],
        near: NDArray[np.int64],
        distance: NDArray[np.float64],
        m: int,
    ) -> NDArray[np.int64]:
        weight = np.exp(-self.gamma * distance)
        current = score.tolist()
        heap = [(-value, row) for row, value in enumerate(current)]
        heapq.heapify(heap)
        taken = np.zeros(len(current), np.bool_)
        chosen: list[int] = []
        while len(chosen) < m:
            negative, row = heapq.heappop(heap)
            if taken[row] or -negative != current[row]:
                continue  # an entry that a later update replaced
            taken[row] = True
            chosen.append(row)
            for other, share in zip(near[row].tolist(), weight[row].tolist()):
                if not taken[other]:
                    current[other] -= share * current[row]
                    heapq.heappush(heap, (-current[other], other))
        return np.asarray(chosen, np.int64)


@torch.no_grad()
def nearest_neighbours(
    features: NDArray[np.float32], count: int, block_rows: int = 1024
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Each row's nearest other rows by Euclidean distance: indices and distances, (N, count).

    Memory is ``block_rows x N`` floats. ``count`` is capped at N - 1.
    """
    x = torch.from_numpy(np.ascontiguousarray(features, np.float32))
    x = x - x.mean(0)  # keeps the expanded square accurate
    square = (x * x).sum(1)
    count = min(count, len(x) - 1)
    indices, distances = [], []
    for start in range(0, len(x), block_rows):
        part = x[start : start + block_rows]
        product = torch.addmm(square[None, :], part, x.t(), alpha=-2)
        rows = torch.arange(len(part))
        product[rows, rows + start] = torch.inf
        near = product.topk(count, dim=1, largest=False).indices
        exact = (x[near].double() - part[:, None].double()).norm(dim=2)
        indices.append(near)
        distances.append(exact)
    return torch.cat(indices).numpy(), torch.cat(distances).numpy()
