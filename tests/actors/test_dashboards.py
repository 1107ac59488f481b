"""Every query of the dashboard and the alerts asks for a metric that was really exported here.

The metrics are recorded by the code that records them in production and read back over HTTP: from
the page of a Ray node, and from the page that a job serves with ``--metrics``.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import promql_parser
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from actors.metrics import MetricsPage, MetricsRecorder, each_of, ray_gauge
from actors.serving.engine_metrics import EngineMetrics
from actors.serving.ledger import QoELedger
from actors.session import Session
from actors.venn.gateway import GatewayServer
from actors.venn.scheduler import SchedulerServer
from jobs import federate
from jobs.device import serve as device_serve
from jobs.embed.train import JOB as EMBED
from jobs.launcher import Job, JobContext, Summary, main
from jobs.train.__main__ import JOB as TRAIN
from jobs.venn import serve as venn_serve
from raysys import machine
from raysys.errors import ConfigError
from raysys.federated.core.evaluation import Score
from raysys.runs import RunDirectory
from raysys.serving.andes.qoe import Outcome, QoESpec

FOLDER = machine.app_root() / "deploy" / "monitoring"
DEADLINE_S = 200.0  # Ray hands metrics on every ten seconds, a loaded machine later
Exported = dict[str, set[str]]  # name -> label names


def scrape(url: str) -> Exported:
    """Names of the samples on a page with their labels, renamed as Prometheus is told to."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found: Exported = {}
    for line in text.splitlines():
        if (sample := re.match(r"([a-zA-Z_:][\w:]*)(\{.*\})? ", line)) is not None:
            labels = set(re.findall(r'(\w+)="', sample[2] or ""))
            found.setdefault(renamed(sample[1]), set()).update(labels)
    return found


def renamed(name: str) -> str:
    """The name after the ``metric_relabel_configs`` of the scrape configuration."""
    settings = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    for rule in settings["scrape_configs"][0]["metric_relabel_configs"]:
        if rule.get("target_label") == "__name__":
            assert rule["source_labels"] == ["__name__"]
            if (match := re.fullmatch(rule["regex"], name)) is not None:
                return match.expand(rule["replacement"].replace("$", "\\"))
    return name


def record_serving() -> None:
    ledger = QoELedger()
    spec = QoESpec(ttft_s=1.0, tds=4.8)
    for qoe in (0.5, 1.0):
        outcome = Outcome(
            qoe=qoe, counted=True, truncated=False, reason="stop", tokens=9, ttft_s=0.3,
            finished_s=2.0, spec=spec,
        )  # fmt: skip
        ledger.finished("blue", outcome, 1.0)
    ledger.refused("blue", 2.0)
    totals = {"preemptions": 1, "plan_s": 0.1, "live": 2}
    EngineMetrics().update(
        {
            "tenants": {"blue": totals}, "starved": 1, "restore_s": 0.5, "plan_ms_p50": 1.0,
            "plan_ms_p99": 2.0, "kv_use": 0.5, "mode": "full",
        }
    )  # fmt: skip


def record_round(context: Any) -> None:
    summary = federate.RoundSummary(
        round_id=3, attempts=1, counts={"ok": 9, "late": 1}, loss_first=2.0, loss_last=1.0,
        bytes_down=10, bytes_up=5, macs=1, virtual_s=1.0, duration_s=0.5, busy_s=0.4,
        capacity_bias=None, score=Score(accuracy=0.9, loss=0.3, n=10),
    )  # fmt: skip
    federate._record(summary, context)


async def venn_health(folder: Path) -> list[dict[str, Any]]:
    """Health of a real scheduler and gateway."""
    scheduler = SchedulerServer(str(folder), "127.0.0.1:0")
    gateway = GatewayServer("g", f"127.0.0.1:{await scheduler.start()}")
    await gateway.start()
    health = [scheduler.health(), gateway.health()]
    await gateway.close()
    await scheduler.close()
    return health


def record_edge(metrics: MetricsRecorder) -> None:
    server = SimpleNamespace(
        registry=SimpleNamespace(devices={"a": {}}), refused_leases=1, bytes_down=2, bytes_up=1
    )
    report = SimpleNamespace(counts={"ok": 9}, duration_s=1.5)
    score = Score(accuracy=0.9, loss=0.3, n=10)
    service: Any = SimpleNamespace(server=server)
    device_serve._record(metrics, 2, report, score, service)  # type: ignore[arg-type]


def run_and_scrape(job: Job[Any], words: list[str]) -> Exported:
    """Names on the page of a real job at its end."""
    found: Exported = {}

    def run(config: Any, context: JobContext) -> Summary:
        summary = job.run(config, context)
        assert context._page is not None
        found.update(scrape(f"http://127.0.0.1:{context._page.port}/metrics"))
        return summary

    assert main(dataclasses.replace(job, run=run), [*words, "--metrics", "127.0.0.1:0"]) == 0
    return found


def clicks(path: Path) -> Path:
    draw = np.random.default_rng(0)
    user = draw.integers(0, 50, 2000)
    pq.write_table(pa.table({"label": user % 2, "user": user, "item": user % 7}), path)
    return path


@pytest.fixture(scope="module")
def exported(ray_cluster: Session, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    import asyncio

    import ray

    folder = tmp_path_factory.mktemp("metrics")
    run = RunDirectory.create(str(folder / "run"), job="x", config={}, seeds=[], now="2026-01-01")
    record_serving()
    recorder = MetricsRecorder(run, gauges=ray_gauge)
    record_round(SimpleNamespace(metrics=recorder))
    venn_serve._record(recorder, 1, asyncio.run(venn_health(folder / "venn")))
    found: Exported = {}
    page = MetricsPage("127.0.0.1:0")
    record_edge(MetricsRecorder(run, each_of([page.gauge])))
    found |= scrape(f"http://127.0.0.1:{page.port}/metrics")
    page.close()
    small = ["recipe.epochs=1", "recipe.batch_size=128", "network.widths=[4,4,8]"]
    small += ["kgt.window=2", "kgt.every=1", "kgt.modules=4", "data.train_rows=256"]
    words = ["--run-dir", str(folder / "train")]
    found |= run_and_scrape(TRAIN, words + [item for pair in small for item in ("--set", pair)])
    words = ["--run-dir", str(folder / "embed"), "--data", str(clicks(folder / "clicks.parquet"))]
    words += ["--set", "batch=128", "--set", "window=5", "--set", "rows=500"]
    found |= run_and_scrape(EMBED, words)
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    end = time.monotonic() + DEADLINE_S
    wanted = set().union(*map(names_in, [query for _, query in queries()]))
    while time.monotonic() < end:
        found |= scrape(url)
        if wanted <= set(found):
            break
        time.sleep(0.5)
    return found


def queries() -> list[tuple[str, str]]:
    """(title and legend, query) of every panel and every alert."""
    board = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    found = [
        (f"{panel['title']} {target['legendFormat']}", target["expr"])
        for panel in board["panels"]
        for target in panel.get("targets", [])
    ]
    rules = yaml.safe_load((FOLDER / "alerts.yml").read_text())
    return found + [
        (rule["alert"], rule["expr"]) for group in rules["groups"] for rule in group["rules"]
    ]


def nodes(value: Any) -> Iterator[Any]:
    """A parsed query's nodes."""
    if isinstance(value, list):
        for item in value:
            yield from nodes(item)
    elif value is not None:
        yield value
        for name in ("lhs", "rhs", "expr", "args", "vector_selector"):
            yield from nodes(getattr(value, name, None))


def names_in(query: str) -> set[str]:
    """Metrics that a query asks for; raises on one that Prometheus would not parse."""
    found = {
        node.name
        for node in nodes(promql_parser.parse(query))
        if isinstance(node, promql_parser.VectorSelector)
    }
    assert found
    return found


def labels_in(query: str) -> set[str]:
    grouped = re.findall(r"\bby\s*\(([^)]*)\)", query)
    matched = re.findall(r"(\w+)\s*(?:=|!=|=~|!~)\"", query)
    return {label.strip() for text in grouped for label in text.split(",")} | set(matched)


@pytest.mark.parametrize(("title", "query"), queries())
def test_every_query_names_an_exported_metric(title: str, query: str, exported: Exported) -> None:
    names = names_in(query)
    assert names <= set(exported), f"{title}: nobody exports {names - set(exported)}"
    known = {"instance", "job"}.union(*(exported[name] for name in names))
    wanted = labels_in(query) | set(re.findall(r"\{\{(\w+)\}\}", title))
    assert wanted <= known, f"{title}: no label {wanted - known}"


def test_the_parser_refuses_and_the_names_are_found() -> None:
    assert names_in("sum by (a) (rate(x_total[5m])) / max(y{le='1'})") == {"x_total", "y"}
    with pytest.raises(ValueError, match=r".+"):
        promql_parser.parse("sum(rate(x[5m])")


def test_what_is_exported_is_shown(exported: Exported) -> None:
    """A metric of ours that no panel shows is forgotten or needless."""
    shown = set().union(*(names_in(query) for _, query in queries()))
    ours = {name for name in exported if name.startswith("raysys_")}
    ours = {name for name in ours if not name.startswith("raysys_test_")}  # of other tests
    assert ours - shown - {"raysys_ttft_s_sum", "raysys_ttft_s_count"} == set()


def test_the_dashboard_can_be_imported() -> None:
    board = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    rows = [panel["title"] for panel in board["panels"] if panel["type"] == "row"]
    assert [row.split(":")[0] for row in rows] == [
        "Serving", "Federated rounds", "Training", "Venn", "Edge", "The cluster",
    ]  # fmt: skip
    identities = [panel["id"] for panel in board["panels"]]
    assert len(set(identities)) == len(identities)
    cells: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        mine = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not mine & cells, panel["title"]
        assert max(x for x, _ in mine) < 24
        cells |= mine
    assert board["templating"]["list"][0]["query"] == "prometheus"


def test_a_metrics_page_stays_home() -> None:
    for address in ("0.0.0.0:0", "127.0.0.1", "127.0.0.1:99999"):
        with pytest.raises(ConfigError, match="--metrics"):
            MetricsPage(address)
    page = MetricsPage("127.0.0.1:0")
    with pytest.raises(ConfigError, match="free port"):
        MetricsPage(f"127.0.0.1:{page.port}")
    page.close()
    page.close()
