"""The starvation knob: how far a job is behind its fair share (paper, section 4.4).

``T_i = M * sd_i`` is the completion time of job i under fair sharing with M concurrent jobs, where
``sd_i = rounds * (D_i / |S_i| + response)`` is its time alone (our estimate; the paper gives none).
The time usage ``t_i`` is, by our reading, the *attained* service: the time alone of the rounds that
the job finished, at least one. Elapsed time would push long-waiting jobs further back.
"""

from __future__ import annotations

from collections.abc import Sequence

from raysys.federated.venn.requests import Request
from raysys.federated.venn.supply import SupplyView


def time_alone_s(request: Request, supply: SupplyView) -> float:
    """``sd_i``: completion time in seconds if the job had the population to itself."""
    rounds = max(request.rounds, request.rounds_done + 1)
    return rounds * (request.demand / supply.group_rates[request.group] + request.response_s)


def attained_s(request: Request, supply: SupplyView) -> float:
    """``t_i``: time alone of the rounds finished so far, never less than one round."""
    rounds = max(request.rounds, request.rounds_done + 1)
    return time_alone_s(request, supply) * max(request.rounds_done, 1) / rounds


def request_factor(request: Request, supply: SupplyView, competitors: int, eps: float) -> float:
    """``(t_i / T_i)^eps``: below one for a job that got little, which moves it forward."""
    rounds = max(request.rounds, request.rounds_done + 1)
    ratio = max(request.rounds_done, 1) / (rounds * max(competitors, 1))
    return float(ratio**eps)


def queue_factor(
    requests: Sequence[Request], supply: SupplyView, competitors: int, eps: float
) -> float:
    """``(sum T_i / sum t_i)^eps`` of one group: above one for an under-served group."""
    fair = sum(time_alone_s(request, supply) for request in requests) * max(competitors, 1)
    used = sum(attained_s(request, supply) for request in requests)
    return float((fair / used) ** eps)
