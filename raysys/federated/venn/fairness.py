"""The starvation knob: how far a job is behind its fair share (paper, section 4.4).

``T_i = M * sd_i`` is the completion time of job i under fair sharing with M concurrent jobs, where
``sd_i = rounds * (D_i / |S_i| + response)`` is its time alone (our estimate; the paper gives none).

Where we differ: the paper leaves the "time usage" ``t_i`` open. Read as attained service it makes
all jobs advance alike, which delays everybody: on the even workload the speed-up falls from 2.3 to
1.2 at eps = 2 while the worst slow-down grows. We take the other self-consistent form: a job's
priority grows with ``elapsed / T_i``, its time in the system over its fair completion time, so that
nobody is left far behind and little of the speed-up is lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from raysys.federated.venn.requests import Request
from raysys.federated.venn.supply import SupplyView

_LARGEST = 600.0  # of an exponent, so that the products stay finite


def time_alone_s(request: Request, supply: SupplyView) -> float:
    """``sd_i``: completion time in seconds if the job had the population to itself."""
    rounds = max(request.rounds, request.rounds_done + 1)
    return rounds * (request.demand / supply.group_rates[request.group] + request.response_s)


def elapsed_s(request: Request, supply: SupplyView, now_s: float) -> float:
    """Time in the system, never less than one round alone: a newcomer has not waited yet."""
    rounds = max(request.rounds, request.rounds_done + 1)
    return max(now_s - request.registered_s, time_alone_s(request, supply) / rounds)


def request_factor(
    request: Request, supply: SupplyView, competitors: int, eps: float, now_s: float
) -> float:
    """``(T_i / elapsed_i)^eps`` on the demand: small for a job that is late, which goes forward."""
    fair_s = time_alone_s(request, supply) * max(competitors, 1)
    return _power(fair_s / elapsed_s(request, supply, now_s), eps)


def queue_factor(
    requests: Sequence[Request], supply: SupplyView, competitors: int, eps: float, now_s: float
) -> float:
    """``(sum elapsed_i / sum T_i)^eps`` on the queue of one group: large for a late group."""
    fair_s = sum(time_alone_s(request, supply) for request in requests) * max(competitors, 1)
    late_s = sum(elapsed_s(request, supply, now_s) for request in requests)
    return _power(late_s / fair_s, eps)


def _power(ratio: float, eps: float) -> float:
    return math.exp(max(min(eps * math.log(ratio), _LARGEST), -_LARGEST))
