"""The page in a real browser, against a stand-in endpoint; driven by keyboard only."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

pytest.importorskip("websockets", reason="comes with the serving extra: make setup")

from tests.actors.serving_browser import Browser, StandIn, browser, chromium, stand_in

pytestmark = [
    pytest.mark.skipif(chromium() is None, reason="no Chromium: apt-get install chromium"),
    pytest.mark.timeout(180),
]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("chromium")
    with browser(folder) as opened:
        yield opened
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def endpoint(tab: Browser) -> Iterator[StandIn]:
    with stand_in() as server:
        tab.problems.clear()
        tab.call("Page.navigate", url=server.url)
        tab.until("document.querySelectorAll('.pane').length === 2 && model.textContent")
        yield server
        tab.call("Page.navigate", url="about:blank")


def panes(tab: Browser, what: str) -> list[str]:
    found: list[str] = tab.value(
        f"[...document.querySelectorAll('.pane {what}')].map((one) => one.textContent)"
    )
    return found


def test_streams_run_side_by_side_at_reading_pace(tab: Browser, endpoint: StandIn) -> None:
    endpoint.answer_tokens = 2000  # still going when it is stopped, however slow the machine is
    assert tab.value("document.activeElement.id") == "prompt"
    tab.type("Why is the sky blue?")
    tab.press("Enter", "Enter")
    for pane in (0, 1):
        tab.until(f"document.querySelectorAll('.raw')[{pane}].textContent.split(' ').length > 25")
        tab.until(f"document.querySelectorAll('.paced')[{pane}].textContent.length > 0")
    paced, raw = panes(tab, ".paced"), panes(tab, ".raw")
    assert raw[0].startswith(raw[1]) or raw[1].startswith(raw[0])  # both grow while we look
    for arrived, shown in zip(raw, paced):
        assert arrived.startswith(shown)
        assert 0 < len(shown) < len(arrived)  # a steady pace, behind the burst
    tab.until("document.querySelectorAll('.pane .shown')[0].getAttribute('d').length > 20")
    assert sorted(body["vllm_xargs"]["qoe_tds"] for body in endpoint.asked) == [3.3, 4.8]
    assert tab.value("document.querySelectorAll('.curve svg[role=img]').length") == 2
    tab.press("Escape", "Escape")
    tab.until(
        "[...document.querySelectorAll('.outcome')].every((x) => x.textContent === 'stopped')"
    )
    assert not tab.problems


def test_leaving_tells_the_endpoint(tab: Browser, endpoint: StandIn) -> None:
    endpoint.answer_tokens = 400
    tab.press("Enter", "Enter")
    tab.until("document.querySelector('.raw').textContent.length > 40")
    tab.press("Escape", "Escape")
    shown = panes(tab, ".paced")
    tab.until("document.querySelector('.outcome').textContent === 'stopped'")
    for _ in range(1000):
        if endpoint.left == 2:
            break
        tab.until("true")
        tab.call("Runtime.evaluate", expression="new Promise((r) => setTimeout(r, 50))",
                 awaitPromise=True)  # fmt: skip
    assert endpoint.left == 2
    assert len(panes(tab, ".paced")[0]) <= len(shown[0]) + 12  # nothing is shown after leaving


def test_a_refusal_is_told_in_its_words(tab: Browser, endpoint: StandIn) -> None:
    tab.type("fail")
    tab.press("Enter", "Enter")
    text = tab.until("document.querySelector('.outcome.failed')?.textContent")
    assert text == "429: the endpoint is full"


def test_the_service_and_its_bursts(tab: Browser, endpoint: StandIn) -> None:
    tab.until("document.querySelector('#series .shown').getAttribute('d').length > 100")
    assert "QoE" in tab.value("figures.textContent")
    assert tab.value("document.querySelector('#bursts').hidden")
    tab.press("b", "KeyB", alt=True)
    tab.until("document.querySelectorAll('#bursts tbody tr').length === 1")
    row = tab.value("document.querySelector('#bursts tbody tr').textContent")
    assert "Andes" in row
    assert "0.910" in row
    assert endpoint.bursts[0]["policy"] == "andes"
    assert not tab.problems


def test_bursts_may_be_off(tab: Browser, endpoint: StandIn) -> None:
    endpoint.bursts_allowed = False
    tab.until("document.getElementById('burst').disabled")
    assert "page=full" in tab.value("loadnote.textContent")


def test_every_control_is_reached_by_tab_and_has_a_name(tab: Browser, endpoint: StandIn) -> None:
    seen = []
    for _ in range(20):
        tab.press("Tab", "Tab")
        name = (
            "(() => { const e = document.activeElement; return e.id || e.className || e.tagName;"
            " })()"
        )
        seen.append(tab.value(name))
    assert {"send", "stop", "streams", "tokens", "ttft", "tds", "chats", "burst"} <= set(seen)
    unnamed = tab.value(
        "[...document.querySelectorAll('input:not([hidden]), textarea, button')]"
        ".filter((e) => !e.labels?.length && !e.textContent.trim()"
        " && !e.getAttribute('aria-label')).length"
    )
    assert unnamed == 0
