"""Put load on a running service and check every answer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from actors.venn.load import LoadConfig, LoadReport, run_load
from actors.venn.security import SecurityConfig
from jobs.launcher import Job, JobContext, Summary
from raysys.config import check


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadJobConfig:
    """Where and how much.

    Args:
        scheduler: address of the job plane; gateways: addresses, separated by commas.
    """

    scheduler: str = "127.0.0.1:7700"
    gateways: str = "127.0.0.1:7701"
    load: LoadConfig = field(default_factory=LoadConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)

    def __post_init__(self) -> None:
        for name in ("scheduler", "gateways"):
            check(self, name, ":" in getattr(self, name), "host:port")


def run(config: LoadJobConfig, context: JobContext) -> Summary:
    """Drive, check, report; exit code 1 if an answer was wrong."""
    gateways = [address.strip() for address in config.gateways.split(",")]
    report = run_load(config.scheduler, gateways, config.load, config.security)
    lines = describe(report)
    plain = asdict(report)
    plain.pop("latencies_s")
    plain.pop("by_round")
    context.run.write_json("load.json", {**plain, "p99_ms": report.latency_ms(0.99)})
    wrong = report.over_assigned + report.ineligible + report.duplicates
    return Summary(lines=lines, exit_code=int(wrong > 0))


def describe(report: LoadReport) -> list[str]:
    """The report in words."""
    return [
        f"{report.checkins:,} check-ins in {report.seconds:.1f} s: {report.rate_per_s:,.0f}/s",
        f"batch latency p50 {report.latency_ms(0.5):.1f} ms, p99 {report.latency_ms(0.99):.1f} ms",
        f"{report.assigned:,} devices assigned in {report.rounds} finished rounds",
        f"over-assigned {report.over_assigned}, ineligible {report.ineligible}, "
        f"duplicates {report.duplicates}, failed calls {report.errors}",
    ]


JOB = Job(name="venn load", config=LoadJobConfig, run=run)
