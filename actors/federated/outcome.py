"""What a finished job leaves behind: its models by name with what serving needs, and its reasons.

A plain job has one model, an ensemble K of one shape, a family one of each size, and cohorts have
any of these each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError
from raysys.federated.auxo.drawing import cohort_section
from raysys.federated.auxo.drawing import lines as cohort_lines
from raysys.federated.core.datasets import FederatedData
from raysys.federated.core.evaluation import outputs
from raysys.federated.core.model import FlatWeights, ModelSpec
from raysys.federated.fed_ensemble.prediction import (
    fit_temperature,
    loss_by_temperature,
    predict,
)
from raysys.federated.fedtrans.drawing import family_section
from raysys.federated.fedtrans.drawing import lines as family_lines
from raysys.federated.fedtrans.network import net_from_json
from raysys.report import Section

Facts = Mapping[str, Any]


def model_ids(facts: Facts, members: int) -> dict[str, int]:
    """The strategy's model id by the name that a model gets in the file.

    Args:
        facts: of :func:`actors.federated.cohorts.explain`. members: of an ensemble, 1 for none.
    """
    if facts.get("kind") == "fedtrans":
        return _family_ids(facts)
    plain = {"weights" if members == 1 else f"weights.{m}": m for m in range(members)}
    cohorts: dict[str, int] = facts.get("models", {})
    if not cohorts:
        return plain
    families = facts.get("families", {})
    return {
        f"{name}.cohort{cohort}": first + m
        for cohort, first in cohorts.items()
        for name, m in (_family_ids(families[cohort]) if families else plain).items()
    }


def model_facts(
    spec: ModelSpec, models: Mapping[str, FlatWeights], data: FederatedData, facts: Facts
) -> dict[str, Any]:
    """What serving needs beside the weights; temperatures are fitted on the test set.

    Models of one shape predict together, so they have one temperature; those of a family serve one
    by one, so ``family`` has the network and the temperature of each by its name.
    """
    found: dict[str, Any] = {
        "shape": list(data.inputs.shape[1:]),
        "classes": data.classes,
        "outputs": data.classes or int(data.targets.shape[1]),
        "vocabulary": data.vocabulary,
        "members": len(models),
    }
    nets = _nets(facts)
    if not nets:
        stacked = np.stack(list(models.values()))
        return {**found, "temperature": _temperature(spec, stacked, data)}
    family = {}
    for name, values in models.items():
        net = net_from_json(nets[name])
        temperature = _temperature(net.spec(), values[None], data)
        family[name] = {"net": nets[name], "macs": net.macs(), "temperature": temperature}
    return {**found, "members": 1, "temperature": 1.0, "family": family}


def told(facts: Facts) -> list[str]:
    """Why cohorts split and models grew, for a terminal."""
    if facts["kind"] == "fedtrans":
        return family_lines(facts)
    text = cohort_lines(facts)
    for name, family in facts.get("families", {}).items():
        text += ["", f"family of cohort {name}", *family_lines(family)]
    return text


def where(facts: Facts, client: str) -> str:
    """Which model a client has, for a terminal.

    Raises:
        ConfigError: the job has no family, or the client is not listed (the first 10,000 are).
    """
    whole = facts["kind"] == "fedtrans"
    families = {"": facts} if whole else facts.get("families", {})
    for cohort, family in families.items():
        if client in family["clients"]:
            model = family["clients"][client]
            name = "M0, which it is too weak to train" if model < 0 else f"M{model}"
            return f"client {client}: {name}" + (f" of cohort {cohort}" if cohort else "")
    raise ConfigError("CLIENT", client, "the number of a client in a job with a family")


def sections(facts: Facts) -> list[Section]:
    """The same for a report, with the tree of cohorts and the genealogy of models drawn."""
    if not facts:
        return []
    if facts["kind"] == "fedtrans":
        return [family_section(facts)]
    families = facts.get("families", {})
    inner = [family_section(found, f"Family of cohort {name}") for name, found in families.items()]
    return [cohort_section(facts), *inner]


def _family_ids(facts: Facts) -> dict[str, int]:
    return {
        f"weights.model{member['model']}": member["model"]
        for member in facts["family"]
        if member["retired"] is None
    }


def _nets(facts: Facts) -> dict[str, str]:
    """Network of every model of a family by the name in the file; empty without families."""
    if facts.get("kind") == "fedtrans":
        return {f"weights.model{member['model']}": member["net"] for member in facts["family"]}
    return {
        f"{name}.cohort{cohort}": net
        for cohort, family in facts.get("families", {}).items()
        for name, net in _nets(family).items()
    }


def _temperature(spec: ModelSpec, members: npt.NDArray[np.float32], data: FederatedData) -> float:
    if spec.task != "classification" or len(np.unique(data.test_targets)) < 2:
        return 1.0
    inputs = data.test_samples().inputs
    logits = np.stack([outputs(spec, row, inputs).numpy() for row in members])
    losses = loss_by_temperature(predict(logits).probabilities, data.test_targets)
    return fit_temperature(losses, len(data.test_targets), data.classes)
