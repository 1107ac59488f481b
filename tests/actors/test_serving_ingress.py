"""The HTTP side in one process: the real ingress and its routes, an engine that only echoes.

What needs an engine is in tests/jobs/test_serve_engine.py; fuzzing from the schema is here too,
because it must reach every corner and an engine would take its time.
"""

from __future__ import annotations

import asyncio
import json
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the ingress needs vLLM: run `make setup`")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations inside Ray, vLLM and FastAPI
    import httpx
    from ray import serve

from actors.serving.admission import AdmissionConfig
from actors.serving.config import EngineConfig, ServingConfig
from tests.actors.serving_echo import MODEL, Served, chat, send
from tests.jobs.serving_fuzz import fuzz_app

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    return Served(ServingConfig(admission=AdmissionConfig(max_inflight=3)), monkeypatch)


def test_targets_and_switches_reach_the_engine(served: Served) -> None:
    async def go() -> str:
        async with served.client() as client:
            fields = {"qoe_tds": 3.0, "andes_policy": "fcfs", "andes_router": "power_of_two"}
            answer = await client.post(
                "/v1/chat/completions",
                json=chat(vllm_xargs=fields),
                headers={"X-QoE-TTFT-S": "0.5", "X-QoE-Tenant": "blue"},
            )
            return answer.text

    text = asyncio.run(go())
    assert text.count('"content"') == 4
    [body] = served.echo.seen
    assert body.vllm_xargs == {
        "qoe_tds": 3.0,
        "qoe_ttft_s": 0.5,
        "qoe_tenant": "blue",
        "andes_policy": "fcfs",
    }  # fmt: skip  (loopback: policies may be switched, routers may not)
    assert served.ingress.ledger.totals["blue"]["requests"] == 1
    assert served.ingress.gate.inflight.total() == 0


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", "application/xml", None])
def test_only_json_is_read(served: Served, kind: str | None) -> None:
    async def go(headers: dict[str, str]) -> httpx.Response:
        async with served.client() as client:
            content = json.dumps(chat()).encode()
            return await client.post("/v1/chat/completions", content=content, headers=headers)

    answer = asyncio.run(go({"Content-Type": kind} if kind else {}))
    assert answer.status_code == 415
    assert answer.json()["error"]["param"] == "content-type"
    assert asyncio.run(go({"Content-Type": "Application/JSON; charset=utf-8"})).status_code == 200


def test_each_answer_takes_a_place_and_the_worst_one_counts(served: Served) -> None:
    too_many = send(served, chat(n=4))
    assert too_many.status_code == 422
    assert too_many.json()["error"]["param"] == "n"
    # The echo answers only the first of the three: the others' readers get nothing.
    assert send(served, chat(n=3, vllm_xargs={"qoe_ttft_s": 0.0})).status_code == 200
    assert served.ingress.ledger.totals["anonymous"]["requests"] == 1
    assert served.ingress.ledger.totals["anonymous"]["qoe_sum"] < 1.0
    assert served.ingress.gate.inflight.total() == 0
    assert not served.ingress.ledger.live


def test_an_engine_that_dies_ends_the_stream_with_an_error(served: Served) -> None:
    async def go() -> str:
        async with served.client() as client:
            return (await client.post("/v1/chat/completions", json=chat("fail"))).text

    text = asyncio.run(go())
    assert text.count('"content"') == 2
    assert '"error"' in text
    assert "EngineDeadError" in text
    assert text.endswith("data: [DONE]\n\n")
    assert served.ingress.gate.inflight.total() == 0
    assert not served.ingress.ledger.live


def test_bursts_run_once_and_are_accounted(served: Served) -> None:
    burst = {"chats": 5, "tokens": 4, "spread_s": 0.0, "policy": "andes", "ttft_s": 60.0}

    async def go() -> tuple[list[int], dict[str, Any]]:
        async with served.client() as client:
            codes = [
                (await client.post("/qoe/bursts", json=burst, headers=headers)).status_code
                for headers in ({"Origin": "http://elsewhere"}, {"Origin": "http://page.test"}, {})
            ]
            for _ in range(3000):
                state = (await client.get("/qoe")).json()
                if not state["bursts"][0]["running"]:
                    break
                await asyncio.sleep(0.02)
            return codes, state

    codes, state = asyncio.run(go())
    assert codes == [403, 202, 409]
    [last] = state["bursts"]
    assert last["done"] == 5
    # Three places: two of the five were refused, which is a QoE of 0 for their readers.
    assert last["worst_qoe"] == 0.0
    assert last["mean_qoe"] == pytest.approx(0.6)
    assert state["tenants"]["(burst)"]["refused"] == 2
    assert state["series"]
    assert {body.vllm_xargs["andes_policy"] for body in served.echo.seen} == {"andes"}
    assert len({body.request_id for body in served.echo.seen}) == 3  # engines know them apart


def test_where_strangers_come_in_bursts_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    public = Served(ServingConfig(host="0.0.0.0"), monkeypatch)
    bare = Served(ServingConfig(page="none"), monkeypatch)

    async def go(served: Served, path: str, body: Any = None) -> int:
        monkeypatch.setattr(
            serve, "get_replica_context", lambda: SimpleNamespace(servable_object=served.ingress)
        )
        async with served.client() as client:
            asked = client.post(path, json=body) if body is not None else client.get(path)
            return (await asked).status_code

    assert asyncio.run(go(public, "/qoe/bursts", {})) == 403
    assert asyncio.run(go(public, "/")) == 200
    assert asyncio.run(go(public, "/page/app.js")) == 200
    assert asyncio.run(go(bare, "/page/app.js")) == 404
    assert asyncio.run(go(bare, "/qoe/bursts", {})) == 403


def test_the_schema_holds_under_fuzzing(served: Served) -> None:
    report = fuzz_app(served.app, MODEL, examples=6)
    assert report.calls >= 40
    assert report.operations == len(served.app.openapi()["paths"])
    assert not report.failures, report.failures[:3]


def test_only_streams_are_read_as_they_come(served: Served) -> None:
    async def go() -> None:
        async with served.client() as client:
            await client.post("/v1/chat/completions", json=chat(stream=False))

    asyncio.run(go())
    assert not served.ingress.ledger.live
    assert served.ingress.ledger.totals == {}
    assert served.ingress.gate.inflight.total() == 0


def test_stock_vllm_has_one_order_only(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = Served(ServingConfig(engine=EngineConfig(policy="vllm")), monkeypatch)

    async def go() -> list[int]:
        async with stock.client() as client:
            return [
                (await client.post("/qoe/bursts", json={"policy": policy, "chats": 1})).status_code
                for policy in ("andes", "fcfs")
            ]

    assert asyncio.run(go()) == [422, 202]
