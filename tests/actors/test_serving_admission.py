"""The door: keys, limits, Retry-After, and targets from body, headers, key and defaults."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.andes.engine_settings import AndesEngineConfig
from actors.serving.admission import (
    MAX_RETRY_S,
    MIN_RETRY_S,
    AdmissionConfig,
    AdmissionGate,
    ApiKey,
    find_key,
)
from actors.serving.config import FleetConfig, ServingConfig
from actors.serving.ledger import QoELedger
from actors.serving.targets import merge_targets
from raysys.config import config_from_dict, config_to_dict
from raysys.errors import ConfigError
from raysys.serving.andes.qoe import QoESpec, QoETracker

DEFAULTS = ServingConfig(page="read", andes=AndesEngineConfig(default_ttft_s=2.0, default_tds=3.0))


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


BLUE = ApiKey(tenant="blue", sha256=digest("blue-secret"), weight=2.0, max_inflight=3)
RED = ApiKey(tenant="red", sha256=digest("red-secret"))


def test_a_key_is_found_and_a_wrong_one_is_not() -> None:
    assert find_key([BLUE, RED], "red-secret") is RED
    assert find_key([BLUE, RED], "blue-secret ") is None
    assert find_key([BLUE, RED], "") is None
    assert find_key([], "blue-secret") is None
    assert find_key([BLUE], "\ud800") is None  # not even text


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sha256": "blue-secret"}, "sha256"),
        ({"sha256": "A" * 64}, "sha256"),
        ({"tenant": ""}, "tenant"),
        ({"weight": 0.0}, "weight"),
        ({"weight": 1e6}, "weight"),
        ({"max_inflight": 0}, "max_inflight"),
    ],
)
def test_bad_keys_name_their_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ApiKey(**({"tenant": "t", "sha256": digest("k")} | change))
    assert caught.value.field == field


def test_two_keys_of_one_tenant_are_refused() -> None:
    with pytest.raises(ConfigError, match="one key per tenant"):
        AdmissionConfig(keys=(BLUE, BLUE))


def test_settings_with_keys_survive_the_way_to_the_ingress() -> None:
    config = ServingConfig(admission=AdmissionConfig(max_inflight=7, keys=(BLUE, RED)))
    assert config_from_dict(ServingConfig, config_to_dict(config)) == config


@given(limit=st.integers(1, 20), moves=st.lists(st.booleans(), max_size=200))
def test_never_more_inside_than_the_limit(limit: int, moves: list[bool]) -> None:
    gate = AdmissionGate(AdmissionConfig(max_inflight=limit))
    inside, now = 0, 0.0
    for enter in moves:
        now += 0.1
        if enter:
            retry_s = gate.enter("t", now)
            assert (retry_s == 0) == (inside < limit)
            assert retry_s == 0 or MIN_RETRY_S <= retry_s <= MAX_RETRY_S
            inside += retry_s == 0
        elif inside:
            gate.leave("t", now)
            inside -= 1
    assert gate.inflight.total() == inside


@given(limit=st.integers(1, 9), asked=st.lists(st.integers(1, 9), max_size=40))
def test_several_answers_take_several_places(limit: int, asked: list[int]) -> None:
    gate = AdmissionGate(AdmissionConfig(max_inflight=limit))
    assert (gate.most(), gate.most(3)) == (limit, min(limit, 3))
    inside: list[int] = []
    for now, places in enumerate(asked):
        fits = sum(inside) + places <= limit
        assert (gate.enter("t", float(now), None, places) == 0) == fits
        if fits:
            inside.append(places)
        elif inside:
            gate.leave("t", float(now), inside.pop())
    assert gate.inflight.total() == sum(inside)


def test_one_tenant_cannot_take_the_others_room() -> None:
    gate = AdmissionGate(AdmissionConfig(max_inflight=10))
    assert [gate.enter("blue", 0.0, BLUE.max_inflight) == 0 for _ in range(5)] == [True] * 3 + [
        False
    ] * 2
    assert gate.enter("red", 0.0, RED.max_inflight) == 0
    assert gate.refused == 2


def test_a_slow_endpoint_asks_to_stay_away_longer() -> None:
    quick, slow = (AdmissionGate(AdmissionConfig(max_inflight=1)) for _ in range(2))
    for gate, step in ((quick, 0.2), (slow, 20.0)):
        now = 0.0
        for _ in range(30):
            gate.enter("t", now)
            now += step
            gate.leave("t", now)
        gate.enter("t", now)
    assert quick.enter("t", 6.0) == 1
    assert slow.enter("t", 600.0) > 10
    assert slow.enter("t", 1e9) == MAX_RETRY_S  # nothing has left for ages


def test_the_body_wins_over_the_headers_and_both_over_the_default() -> None:
    headers = {"x-qoe-tds": "7", "x-qoe-ttft-s": "0.5", "accept": "*/*"}
    fields, spec = merge_targets({"qoe_tds": 5.0}, headers, None, DEFAULTS)
    assert (spec.ttft_s, spec.tds) == (0.5, 5.0)
    assert fields == {"qoe_tds": 5.0, "qoe_ttft_s": 0.5}  # numbers, whatever the header said
    fields, spec = merge_targets(None, {}, None, DEFAULTS)
    assert fields == {}
    assert (spec.ttft_s, spec.tds) == (2.0, 3.0)


def test_other_fields_pass_through_but_the_switches_do_not() -> None:
    given = {"andes_policy": "fcfs", "andes_router": "power_of_two", "my_processor": [1, 2]}
    assert merge_targets(given, {}, None, DEFAULTS)[0] == {"my_processor": [1, 2]}
    switchable = ServingConfig(
        page="read",
        andes=AndesEngineConfig(switchable=True),
        fleet=FleetConfig(switchable=True),
    )
    assert merge_targets(given, {}, None, switchable)[0] == given


def test_the_page_may_switch_policies_only_where_strangers_cannot() -> None:
    assert ServingConfig().engine_andes.switchable
    assert not ServingConfig(host="0.0.0.0").engine_andes.switchable
    assert not ServingConfig(admission=AdmissionConfig(keys=(RED,))).bursts
    assert ServingConfig(host="0.0.0.0", page="full").bursts
    assert not ServingConfig(page="read").bursts


def test_a_key_decides_tenant_and_weight() -> None:
    greedy = {"qoe_tenant": "red", "qoe_weight": 99.0}
    fields, spec = merge_targets(greedy, {}, BLUE, DEFAULTS)
    assert (fields["qoe_tenant"], fields["qoe_weight"]) == ("blue", 2.0)
    assert (spec.tenant, spec.weight) == ("blue", 2.0)
    fields, _ = merge_targets({"qoe_weight": 0.5}, {}, BLUE, DEFAULTS)
    assert fields["qoe_weight"] == 0.5  # a client may ask for less


@pytest.mark.parametrize(
    ("fields", "headers", "name"),
    [
        ({"qoe_tds": -1}, {}, "qoe_tds"),
        ({"qoe_tds": 0}, {}, "qoe_tds"),
        ({"qoe_tds": 1e9}, {}, "qoe_tds"),
        ({"qoe_tds": math.nan}, {}, "qoe_tds"),
        ({"qoe_tds": math.inf}, {}, "qoe_tds"),
        ({"qoe_tds": True}, {}, "qoe_tds"),
        ({"qoe_ttft_s": -0.1}, {}, "qoe_ttft_s"),
        ({"qoe_ttft_s": [1]}, {}, "qoe_ttft_s"),
        ({"qoe_weight": 0}, {}, "qoe_weight"),
        ({"qoe_kind": "singing"}, {}, "qoe_kind"),
        ({"qoe_tenant": ""}, {}, "qoe_tenant"),
        ({"qoe_speed": 3}, {}, "qoe_speed"),
        ({}, {"x-qoe-tds": "fast"}, "qoe_tds"),
        ({}, {"x-qoe-tds": "nan"}, "qoe_tds"),
    ],
)
def test_bad_targets_name_their_field(fields: Any, headers: Any, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        merge_targets(fields, headers, None, DEFAULTS)
    assert caught.value.field == name


def test_the_ledger_counts_refused_readers_as_nothing() -> None:
    ledger = QoELedger(metrics=False)
    good = QoETracker(QoESpec(), 0.0)
    good.on_token(0.5, 10)
    ledger.finished("blue", good.finish(1.0), 1.0)
    assert ledger.mean_qoe("blue") == 1.0
    ledger.refused("blue", 1.0)
    assert ledger.mean_qoe("blue") == 0.5
    ledger.finished("red", QoETracker(QoESpec(), 0.0).finish(0.1, "cancelled"), 0.1)
    assert ledger.mean_qoe("red") == 1.0  # left before it expected anything
    assert ledger.totals["red"]["left_early"] == 1


def test_the_ledger_tells_the_experience_over_time() -> None:
    ledger = QoELedger(metrics=False)
    assert ledger.sample(0.0) == {"t": 0.0, "live": 0.0, "qoe": 1.0, "behind": 0.0}
    waiting = QoETracker(QoESpec(ttft_s=1.0), 0.0)
    ledger.live.add(waiting)
    ledger.refused("blue", 5.0)
    assert ledger.sample(10.0) == {"t": 10.0, "live": 1.0, "qoe": 0.0, "behind": 1.0}
    ledger.live.discard(waiting)
    assert ledger.sample(40.0)["qoe"] == 1.0  # the refusal is longer than 30 s ago
    assert len(ledger.series) == 3


def test_tenants_of_strangers_are_bounded() -> None:
    ledger = QoELedger(metrics=False)
    for number in range(500):
        ledger.refused(f"tenant-{number}", 1.0)
    assert len(ledger.totals) <= 101
    assert ledger.totals["(others)"]["refused"] == 400
