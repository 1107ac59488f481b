"""Train a federated model: clients in bulk on every core, any server optimiser, exact resume.

raysys federate --config my.yaml --run-dir runs/mine
raysys federate explain runs/mine      # why cohorts split and models grew
raysys federate explain runs/mine 7 12 # and which model clients 7 and 12 have
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from actors.federated.cohorts import build_auxo, build_family
from actors.federated.coordinator import EXPLAIN_FILE, RoundSummary
from actors.federated.driver import FederatedRun, MakeJob
from actors.federated.ensemble import build_ensemble
from actors.federated.outcome import model_facts, model_ids, sections, told, where
from actors.venn.cohorts import VennConfig, finish_job, with_venn
from jobs.launcher import Job, JobContext, Summary, main
from raysys import machine
from raysys.config import check, check_range
from raysys.errors import ConfigError, InfeasibleError, RaysysError
from raysys.federated.auxo.config import AuxoConfig
from raysys.federated.core.datasets import FederatedData
from raysys.federated.core.model import ModelSpec, layout_of
from raysys.federated.core.population import Population
from raysys.federated.core.recipe import FederatedConfig, load_data, make_job, make_population
from raysys.federated.core.serialize import pack_arrays
from raysys.federated.fed_ensemble.ensemble import EnsembleConfig
from raysys.federated.fedtrans.recipe import FamilyConfig, first_net, with_speeds
from raysys.report import Plot, Section, Table, new_figure, render_page
from raysys.runs import RunDirectory

REPORT = "report.html"
MODEL_FILE = "model.arrow"
MODEL_FACTS = "model.json"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FederateConfig:
    """A training run.

    Args:
        recipe: what is trained, and how.
        venn: take the devices of every round from this Venn service; None draws them here.
        ensemble: train K models at the cost of one (Fed-ensemble); None trains one.
        auxo: find cohorts of similar clients while training (Auxo); None has one cohort.
        family: grow a family of models that fits unequal devices (FedTrans); None trains one size.
        rounds: number of rounds.
        workers: worker actors. worker_cpus: logical CPUs each of them reserves.
        combiners: actors that add up the workers' sums; None takes one per eight workers beyond
            the first eight.
        evaluate_every: rounds between evaluations; 0 for none.
        checkpoint_every: rounds between checkpoints; 0 for none.
    """

    recipe: FederatedConfig = dataclasses.field(default_factory=FederatedConfig)
    ensemble: EnsembleConfig | None = None
    auxo: AuxoConfig | None = None
    family: FamilyConfig | None = None
    venn: VennConfig | None = None
    rounds: int = 100
    workers: int = 2
    worker_cpus: float = 1.0
    combiners: int | None = None
    evaluate_every: int = 10
    checkpoint_every: int = 20

    def __post_init__(self) -> None:
        both = self.family is not None and self.ensemble is not None
        check(self, "family", not both, "None with an ensemble", "A family is several models")
        check_range(self, "rounds", 1)
        check_range(self, "workers", 1)
        check_range(self, "worker_cpus", 0)
        if self.combiners is not None:
            check_range(self, "combiners", 0)
        check_range(self, "evaluate_every", 0)
        check_range(self, "checkpoint_every", 0)

    @property
    def seed(self) -> int:
        """The recipe's seed, for the manifest."""
        return self.recipe.seed


def run(config: FederateConfig, context: JobContext) -> Summary:
    """Train, recording every round; the run directory gets the model and a report."""
    recipe = config.recipe
    data = load_data(recipe.data, recipe.seed, machine.data_dir())
    population = make_population(recipe, data)
    spec, make, population = _plan(config, data, population)
    layout_of(spec)
    have = _rounds_done(context) if context.resumed else 0
    context.ray(num_cpus=max(config.workers, machine.available_cores()))
    if config.venn is not None:
        venn = dataclasses.replace(config.venn, rounds=config.venn.rounds or config.rounds)
        make = functools.partial(with_venn, make, venn)
    federated = FederatedRun(
        recipe,
        data,
        population,
        spec,
        workers=config.workers,
        worker_cpus=config.worker_cpus,
        combiners=config.combiners,
        run_uri=context.run.uri,
        checkpoint_every=config.checkpoint_every,
        evaluate_every=config.evaluate_every,
        make=make,
    )
    try:
        summaries = _follow(federated, config, context, have)
        if config.venn is not None:
            finish_job(config.venn)
        explained = federated.explain()
        context.run.write_json(EXPLAIN_FILE, explained)
        ids = model_ids(explained, 1 if config.ensemble is None else config.ensemble.k)
        models = {name: federated.weights(model) for name, model in ids.items()}
        context.run.storage.write(MODEL_FILE, pack_arrays(models))
        context.run.write_json(MODEL_FACTS, model_facts(spec, models, data, explained))
        facts = federated.health()
    finally:
        federated.close()
    return _finish(config, context, data, population, summaries, {**facts, "explained": explained})


def _plan(
    config: FederateConfig, data: FederatedData, population: Population
) -> tuple[ModelSpec, MakeJob, Population]:
    """The (first) model, how the coordinator builds the job, and the population with its speeds."""
    recipe = config.recipe
    if config.family is not None:
        net = first_net(config.family, recipe.model, data)
        population = with_speeds(population, net, config.family, recipe.seed)
        family = functools.partial(build_family, recipe, config.family, config.auxo, net)
        return net.spec(), family, population
    spec = recipe.model.spec(data)
    make: MakeJob = functools.partial(make_job, recipe, spec)
    if config.ensemble is not None:
        make = functools.partial(build_ensemble, recipe, config.ensemble, spec)
    if config.auxo is not None:
        make = functools.partial(build_auxo, recipe, config.auxo, config.ensemble, spec)
    return spec, make, population


def explain(arguments: Sequence[str]) -> int:
    """Print why cohorts and models of a run are what they are, from its newest checkpoint.

    Args:
        arguments: the run directory; after it, clients to look up.
    """
    try:
        if not arguments:
            raise ConfigError(
                "RUN", "nothing", "a run directory", "raysys federate explain RUN [CLIENT ...]"
            )
        found = RunDirectory.open(arguments[0]).load_checkpoint()
        facts = {} if found is None else json.loads(found[1].get(EXPLAIN_FILE, b"{}"))
        if not facts:
            raise InfeasibleError(
                f"explain {arguments[0]}", "no cohorts, no family, or no checkpoint yet",
                "Give a run with auxo or family, and checkpoint_every set",
            )  # fmt: skip
        placed = [where(facts, client) for client in arguments[1:]]
    except RaysysError as error:
        print(f"raysys: error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"after round {found[0] if found else 0}")
    print("\n".join([*told(facts), *placed]))
    return 0


def _follow(
    federated: FederatedRun, config: FederateConfig, context: JobContext, have: int
) -> list[RoundSummary]:
    summaries = []
    with context.progress("rounds", total=config.rounds) as advance:
        advance(have)
        for summary in federated.rounds(config.rounds, have):
            summaries.append(summary)
            _record(summary, context)
            advance(1)
    return summaries


def _record(summary: RoundSummary, context: JobContext) -> None:
    """Metrics of a round, and its row in the ``rounds`` table."""
    step = summary.round_id
    values = {
        "federated_loss": summary.loss_last,
        "federated_round_s": summary.duration_s,
        "federated_bytes_up": float(summary.bytes_up),
    }
    if summary.score is not None:
        values["federated_test_loss"] = summary.score.loss
        values["federated_test_accuracy"] = summary.score.accuracy
    for name, value in values.items():
        if math.isfinite(value):
            context.metrics.record(name, value, step=step)
    context.metrics.record("federated_round", step, step=step)
    for outcome, count in summary.counts.items():
        context.metrics.record("federated_updates", count, step=step, tags={"outcome": outcome})


def _rounds_done(context: JobContext) -> int:
    """Rounds of the newest checkpoint: where the coordinator will go on."""
    steps = context.run.checkpoints()
    return steps[-1] if steps else 0


def _finish(
    config: FederateConfig,
    context: JobContext,
    data: FederatedData,
    population: Population,
    summaries: list[RoundSummary],
    facts: dict[str, Any],
) -> Summary:
    rows = [_row(summary) for summary in summaries]
    context.run.append_rows("rounds", rows)
    # The first round waits for the workers to start; it says nothing about their speed.
    warm = summaries[1:] or summaries
    trained = sum(summary.counts["ok"] for summary in summaries)
    speed = sum(s.counts["ok"] for s in warm) / max(sum(s.duration_s for s in warm), 1e-9)
    scored = [s for s in summaries if s.score is not None]
    lines = [
        f"{data.name}: {population.n_clients} clients, {len(summaries)} rounds,"
        f" {trained} updates, {speed:.0f} clients/s"
        f" ({facts['rung']} kernels, {config.workers} workers)",
    ]
    if scored and scored[-1].score is not None:
        score = scored[-1].score
        lines.append(
            f"test loss {score.loss:.4f}, accuracy {score.accuracy:.4f} ({score.n} samples)"
        )
    if facts["privacy"] is not None:
        lines.append(facts["privacy"]["statement"])
    context.run.write_json("result.json", _result(config, summaries, trained, speed, facts))
    report = render_page(
        "Federated training",
        " ".join(lines),
        [
            _curves(scored),
            *sections(facts["explained"]),
            _losses(summaries),
            _table(config, summaries, facts),
        ],
    )
    context.run.storage.write(REPORT, report.encode())
    return Summary(lines=lines, report=REPORT)


def _row(summary: RoundSummary) -> dict[str, Any]:
    plain = dataclasses.asdict(summary)
    score, spread = plain.pop("score"), plain.pop("spread") or {}
    counts = {f"clients_{name}": n for name, n in plain.pop("counts").items()}
    scores = {f"test_{name}": value for name, value in (score or {}).items()}
    return {**plain, **counts, **scores, **{f"client_{p}": v for p, v in spread.items()}}


def _result(
    config: FederateConfig,
    summaries: list[RoundSummary],
    trained: int,
    speed: float,
    facts: dict[str, Any],
) -> dict[str, Any]:
    scores = [s.score for s in summaries if s.score is not None]
    last = scores[-1] if scores else None
    return {
        "rounds": config.rounds,
        "updates": trained,
        "clients_per_s": speed,
        "rung": facts["rung"],
        "replaced_workers": facts["replaced"],
        "privacy": facts["privacy"],
        "test_loss": last.loss if last and math.isfinite(last.loss) else None,
        "test_accuracy": last.accuracy if last and math.isfinite(last.accuracy) else None,
    }


def _curves(scored: list[RoundSummary]) -> Section:
    """Central score and the spread over clients, by round."""
    figure, axes = new_figure()
    rounds = [s.round_id + 1 for s in scored]
    for low, high, alpha in (("p10", "p90", 0.15), ("p25", "p75", 0.3)):
        pairs = [(s.spread or {}).get(low, math.nan) for s in scored]
        others = [(s.spread or {}).get(high, math.nan) for s in scored]
        axes.fill_between(rounds, pairs, others, alpha=alpha, label=f"clients {low} to {high}")
    axes.plot(
        rounds, [(s.spread or {}).get("p50", math.nan) for s in scored], label="median client"
    )
    central = [math.nan if s.score is None else s.score.accuracy for s in scored]
    axes.plot(rounds, central, label="central test set")
    axes.set_xlabel("round")
    axes.set_ylabel("accuracy")
    axes.legend()
    plot = Plot(
        title="Accuracy by round, and its spread over clients",
        caption="Bands: percentiles of accuracy on each client's own training samples.",
        figure=figure,
    )
    return Section(title="Accuracy", plots=[plot] if scored else [])


def _losses(summaries: list[RoundSummary]) -> Section:
    figure, axes = new_figure()
    rounds = [s.round_id + 1 for s in summaries]
    axes.plot(rounds, [s.loss_first for s in summaries], label="first local batch")
    axes.plot(rounds, [s.loss_last for s in summaries], label="last local batch")
    axes.set_xlabel("round")
    axes.set_ylabel("mean loss of the round's clients")
    axes.legend()
    plot = Plot(title="Local loss", caption="Before and after local training.", figure=figure)
    return Section(title="Local training", plots=[plot])


def _table(config: FederateConfig, summaries: list[RoundSummary], facts: dict[str, Any]) -> Section:
    totals: dict[str, int] = {}
    for summary in summaries:
        for name, n in summary.counts.items():
            totals[name] = totals.get(name, 0) + n
    rows = [[name, str(n)] for name, n in totals.items()]
    rows += [
        ["bytes down", f"{sum(s.bytes_down for s in summaries):,}"],
        ["bytes up", f"{sum(s.bytes_up for s in summaries):,}"],
        ["multiply-accumulates", f"{sum(s.macs for s in summaries):.3e}"],
        ["simulated seconds", f"{sum(s.virtual_s for s in summaries):.1f}"],
        ["rung", facts["rung"]],
        ["workers replaced", str(facts["replaced"])],
    ]
    if facts["privacy"] is not None:
        rows.append(["privacy", facts["privacy"]["statement"]])
    return Section(title="Totals", tables=[Table(headers=["what", "how much"], rows=rows)])


JOB = Job(name="federate", config=FederateConfig, run=run)


def command_line(arguments: Sequence[str] | None = None) -> int:
    """Train, or explain a run."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return explain(given[1:]) if given[:1] == ["explain"] else main(JOB, given)


if __name__ == "__main__":
    raise SystemExit(command_line())
