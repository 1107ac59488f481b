"""Tour stage: the phone table from the SoC model, and a real training that moves on this host."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from actors.swan.engine import EngineConfig, Swan
from jobs.bench.swan.loads import burner
from jobs.bench.swan.model import explored
from jobs.bench.swan.networks import Training
from jobs.tour.stage import Row, Stage, StageContext, StageResult
from raysys.federated.swan.choices import Choice, enumerate_choices, greedy_choice
from raysys.federated.swan.exploration import ExplorationConfig
from raysys.federated.swan.pilot import Policy
from raysys.federated.swan.simulation import model_estimates
from raysys.federated.swan.soc import (
    BETAS,
    PHONES,
    WORKLOADS,
    Phone,
    Workload,
    step_energy,
    step_time,
)
from raysys.report import Plot, new_figure

SHOWN = ((0, 1, 1.0), (0, 2, 4.0), (3, 0, 0.0), (4, 2, 4.0))  # phone, network, beta
OWNER_SHARE = 0.8


@dataclass(slots=True)
class Migration:
    """A training beside an owner who comes and goes: times of steps (end, seconds) and moves."""

    steps: list[tuple[float, float]] = field(default_factory=list)
    moves: list[tuple[float, str, str]] = field(default_factory=list)
    owner_from_s: float = 0.0
    owner_to_s: float = 0.0
    core: int = 0

    @property
    def reaction_s(self) -> float | None:
        """From the owner's return to the first move."""
        later = [at for at, _, _ in self.moves if self.owner_from_s <= at <= self.owner_to_s]
        return later[0] - self.owner_from_s if later else None

    def rate(self, start_s: float, end_s: float) -> float:
        """Steps per second between two moments."""
        count = sum(start_s <= at < end_s for at, _ in self.steps)
        return count / max(end_s - start_s, 1e-9)


def run(context: StageContext) -> StageResult:
    """Fill the table, then train for real while another process takes a core."""
    context.progress(0, 3, "five phones, three networks, three scenarios")
    rows = _phone_rows()
    if len(os.sched_getaffinity(0)) < 2:
        return StageResult(rows=rows, plots=[_phone_plot()], notes=["one core: no migration shown"])
    context.progress(1, 3, "a training that gives way on this host")
    before_s, owner_s, after_s = (1.0, 2.0, 1.0) if context.smoke else (4.0, 5.0, 4.0)
    migration = migrate(before_s, owner_s, after_s)
    context.progress(3, 3, "done")
    rows += _real_rows(migration)
    notes = [
        "The phone table is the SoC model's and no measurement of a phone; "
        "beta is the scenario of the software stack, 0 being healthy depthwise kernels.",
        *(f"after {at:.1f} s: {where} ({why})" for at, where, why in migration.moves),
    ]
    return StageResult(rows=rows, plots=[_phone_plot(), _real_plot(migration)], notes=notes)


def migrate(before_s: float, owner_s: float, after_s: float) -> Migration:
    """Train under Swan; for ``owner_s`` in the middle, a process pinned to our core wants it."""
    found = Migration()
    training = Training("ResNet")
    training.step()  # what torch loads at the first step is not part of the story
    started_s = time.monotonic()

    def note(event: dict[str, Any]) -> None:
        if event["kind"] == "move":
            where = f"{event['target']} on cores {event.get('cores', [])}"
            found.moves.append((event["at_s"] - started_s, where, event["reason"]))

    policy = Policy(exploration=ExplorationConfig(min_s=0.2))
    with (
        Swan(EngineConfig(policy=policy), on_event=note) as swan,
        swan.training(optimizer=training.optimizer),
    ):

        def train(seconds: float) -> None:
            until_s = time.monotonic() + seconds
            while time.monotonic() < until_s:
                began_s = time.monotonic()
                training.step()
                ended_s = time.monotonic()
                found.steps.append((ended_s - started_s, ended_s - began_s))

        train(before_s)
        found.core = swan.status()["applied"][0]
        with burner(found.core, OWNER_SHARE):
            found.owner_from_s = time.monotonic() - started_s
            train(owner_s)
            found.owner_to_s = time.monotonic() - started_s
        train(after_s)
    return found


def _phone_rows() -> list[Row]:
    rows = []
    for phone_index, network_index, beta in SHOWN:
        phone, workload = PHONES[phone_index], WORKLOADS[network_index]
        greedy, ours, label = _cell(phone, workload, beta)
        for place, (what, unit) in enumerate((("step time", "s"), ("step energy", "J"))):
            rows.append(
                Row(
                    measure=f"{what}, {workload.name} on {phone.name}, beta {beta:g} ({label})",
                    unit=f"{unit}, SoC model",
                    better="lower",
                    baseline_name="greedy, all fast cores",
                    baseline=greedy[place],
                    ours=ours[place],
                )
            )
    return rows


def _cell(
    phone: Phone, workload: Workload, beta: float
) -> tuple[tuple[float, float], tuple[float, float], str]:
    """Seconds and joules of a step, greedy's and ours, and the name of our choice."""
    topology = phone.topology()
    _, _, settled = explored(phone, workload, beta, seed=0)
    both = [
        (
            step_time(phone, workload, choice, beta) / phone.rate,
            step_energy(phone, workload, choice, beta) / phone.rate,
        )
        for choice in (greedy_choice(topology), settled)
    ]
    return both[0], both[1], settled.label(topology)


def _real_rows(migration: Migration) -> list[Row]:
    reaction_s = migration.reaction_s
    during = migration.rate(migration.owner_from_s, migration.owner_to_s)
    before = migration.rate(0.5 * migration.owner_from_s, migration.owner_from_s)
    rows = [
        Row(
            measure="steps per second on this host while another process wants our core",
            unit="1/s",
            better="higher",
            baseline_name="undisturbed",
            baseline=before,
            ours=during,
        )
    ]
    if reaction_s is not None:
        rows.append(
            Row(
                measure="time to give way",
                unit="s",
                better="lower",
                baseline_name="aim",
                baseline=1.0,
                ours=reaction_s,
            )
        )
    return rows


def _phone_plot() -> Plot:
    figure, axes = new_figure()
    phone = PHONES[0]
    topology = phone.topology()
    choices = enumerate_choices(topology)
    labels = [choice.label(topology) for choice in choices]
    # A line joins choices of the same fastest cluster; between clusters there is no way.
    ways = [list(group) for _, group in groupby(range(len(labels)), lambda i: _fastest(choices[i]))]
    for beta in BETAS:
        times = [item.seconds for item in model_estimates(phone, WORKLOADS[1], beta)]
        colour = None
        for way in ways:
            label = "" if colour else f"beta {beta:g}"
            values = [times[i] for i in way]
            (line,) = axes.plot(way, values, marker="o", color=colour, label=label)
            colour = line.get_color()
    axes.set_xticks(range(len(labels)), labels, rotation=40, ha="right", fontsize=8)
    axes.set_yscale("log")
    axes.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    axes.set_ylabel("step time, one prime core = 1")
    _legend_above(axes)
    caption = (
        "Cheapest choice left. With healthy kernels more cores help; with thrashing depthwise "
        "kernels one core is best. The engine tells the two apart by measuring."
    )
    return Plot(title=f"MobileNetV2 on a {phone.name} (SoC model)", caption=caption, figure=figure)


def _real_plot(migration: Migration) -> Plot:
    figure, axes = new_figure()
    axes.plot(
        [at for at, _ in migration.steps],
        [1000 * seconds for _, seconds in migration.steps],
        linewidth=1,
        marker=".",
        label="step",
    )
    axes.axvspan(
        migration.owner_from_s,
        migration.owner_to_s,
        alpha=0.15,
        label=f"core {migration.core} wanted",
    )
    for place, (at, _, _) in enumerate(migration.moves):
        axes.axvline(
            at, linestyle="--", linewidth=1, color="#d9641e", label="" if place else "move"
        )
    axes.set_xlabel("s")
    axes.set_ylabel("step time, ms")
    axes.set_ylim(bottom=0)
    _legend_above(axes)
    caption = (
        f"A pinned process takes {OWNER_SHARE:.0%} of one of our cores in the shaded time. Moves "
        "change affinity and thread count of the running training; nothing is copied."
    )
    return Plot(title="A training that gives way, on this host", caption=caption, figure=figure)


def _fastest(choice: Choice) -> int:
    """Number of the fastest cluster that a choice uses."""
    return max(place for place, count in enumerate(choice.counts) if count)


def _legend_above(axes: Any) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)


STAGE = Stage(
    name="swan",
    title="Swan",
    problem=(
        "Training on a phone or laptop on all fast cores can be slower and far hungrier than on "
        "fewer, and the owner notices. Which cores are best must be measured, and changed at once "
        "when the owner needs them."
    ),
    command="raysys device join --server HOST:PORT",
    run=run,
)
