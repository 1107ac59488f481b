"""The benchmark contract: medians, paired ratios, JSON."""

from __future__ import annotations

import json

import pytest

from raysys.bench import Claim, Profile, paired_claim, result_to_dict
from raysys.errors import ConfigError


def test_paired_claim_takes_medians_of_each_side_and_of_the_ratios() -> None:
    claim = paired_claim(
        "speed",
        "1/s",
        "higher",
        ours=[10.0, 30.0, 20.0],
        baseline_name="loop",
        baseline=[5.0, 10.0, 20.0],
        seeds=[1],
    )
    assert claim.value == 20.0
    assert claim.baseline is not None
    assert claim.baseline.value == 10.0
    assert claim.ratio == 2.0
    assert claim.samples["ratio"] == [2.0, 3.0, 1.0]


@pytest.mark.parametrize(("ours", "baseline"), [([], []), ([1.0], []), ([1.0], [1.0, 2.0])])
def test_paired_claim_needs_pairs(ours: list[float], baseline: list[float]) -> None:
    with pytest.raises(ConfigError, match="baseline"):
        paired_claim("x", "s", "lower", ours=ours, baseline_name="b", baseline=baseline)


def test_claims_are_finite() -> None:
    with pytest.raises(ConfigError, match="finite"):
        Claim(name="x", value=float("nan"), unit="s", better="lower")


def test_result_has_the_fields_of_the_contract() -> None:
    claim = Claim(name="x", value=1.0, unit="s", better="lower")
    result = result_to_dict("demo", Profile(), [claim], {"n": 1}, {"cores": 2}, 1.23456)
    assert set(json.loads(json.dumps(result))) == {
        "system",
        "profile",
        "claims",
        "config",
        "environment",
        "duration_s",
    }
    assert set(result["claims"][0]) == {
        "name",
        "value",
        "unit",
        "better",
        "baseline",
        "ratio",
        "samples",
        "seeds",
    }


def test_profile_picks() -> None:
    assert Profile().pick(1, 2) == 1
    assert Profile(name="full").pick(1, 2) == 2
