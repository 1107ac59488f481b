"""Autoscaling on QoE: Ray Serve's custom policy hook around :mod:`raysys.serving.andes.scaling`.

Ray Serve calls the policy with the figures that the replicas reported
(:func:`actors.serving.replica.autoscaling_figures`) and applies bounds and delays itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raysys.config import config_from_dict
from raysys.serving.andes.scaling import ReplicaReading, ScalingConfig, desired_replicas

FIGURES = {
    "qoe_demand_tds": "demand_tds",
    "qoe_speed_tds": "speed_tds",
    "qoe_readers": "readers",
    "qoe_below_target": "below_target",
}


class QoEScalingPolicy:
    """Wants as many replicas as the readers need.

    Args:
        options: fields of :class:`ScalingConfig` (JSON: Ray Serve ships them to its controller).
    """

    def __init__(self, **options: Any) -> None:
        self.config = config_from_dict(ScalingConfig, options)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """One decision; ``context`` is Ray Serve's ``AutoscalingContext``."""
        readings = replica_readings(context.aggregated_metrics or {})
        return desired_replicas(
            self.config,
            readings,
            context.target_num_replicas,
            float(context.current_time or 0.0),
            context.policy_state,
        )


def replica_readings(metrics: Mapping[str, Mapping[Any, float]]) -> list[ReplicaReading]:
    """Readings of the replicas that reported every figure."""
    replicas = set.intersection(*(set(metrics.get(name, {})) for name in FIGURES))
    return [
        ReplicaReading(**{field: metrics[name][replica] for name, field in FIGURES.items()})
        for replica in sorted(replicas, key=str)
    ]
