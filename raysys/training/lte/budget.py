"""Which threshold a server uses at which load (ours).

A checkpoint trained with several thresholds serves several budgets: a higher threshold switches
more experts off. Under load the server moves up at once, and comes back only after some calm steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from raysys.training.lte.config import require


class LoadBudget:
    """Threshold offset in logits by the number of tokens in a step.

    Args:
        levels: ``(tokens, offset)``, ascending in both; an offset holds from that many tokens on.
        patience: steps that must ask for a lower level before it is taken.

    Raises:
        LTEConfigError: the levels are not ascending, finite and from 0 or 1 tokens on.
    """

    def __init__(self, levels: Sequence[tuple[int, float]], patience: int = 8) -> None:
        pairs = [(int(tokens), float(offset)) for tokens, offset in levels]
        expected = "pairs (tokens, offset), ascending in both, the first for at most 1 token"
        ascending = all(a[0] < b[0] and a[1] <= b[1] for a, b in itertools.pairwise(pairs))
        usable = bool(pairs) and pairs[0][0] <= 1 and all(math.isfinite(o) for _, o in pairs)
        require("levels", list(levels), usable and ascending, expected)
        require("patience", patience, patience >= 1, "at least 1")
        self.levels = pairs
        self.patience = patience
        self._level = 0
        self._calm = 0

    def step(self, tokens: int) -> float:
        """Offset for a step that computes ``tokens`` tokens."""
        wanted = max((i for i, (least, _) in enumerate(self.levels) if tokens >= least), default=0)
        if wanted >= self._level:
            self._level, self._calm = wanted, 0
        else:
            self._calm += 1
            if self._calm >= self.patience:
                self._level, self._calm = wanted, 0
        return self.levels[self._level][1]
