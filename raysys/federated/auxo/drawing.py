"""The cohort tree and the reasons for its shape, for reports and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raysys.report import Plot, Section, Table, new_figure, series_color
from raysys.report.figures import INK

Facts = Mapping[str, Any]


def cohort_section(facts: Facts) -> Section:
    """A report's section about cohorts, from :func:`raysys.federated.auxo.explain.explain`."""
    tables = [
        Table(
            headers=[
                "cohort",
                "since round",
                "members",
                "clients a round",
                "why it is whole",
            ],
            rows=[_cohort_row(c) for c in facts["cohorts"] if c["trains"]],
        ),
        Table(headers=["round", "what", "why"], rows=[_event_row(e, facts) for e in told(facts)]),
    ]
    return Section(title="Cohorts", plots=[tree_plot(facts)], tables=tables)


def told(facts: Facts) -> list[Facts]:
    """Events worth a line each; blocked clients are only counted."""
    return [event for event in facts["events"] if event["event"] != "blocked"]


def lines(facts: Facts) -> list[str]:
    """The same for a terminal: the tree, indented, then what happened and why."""
    text = []
    for cohort in _depth_first(facts["cohorts"]):
        depth = cohort["name"].count(".")
        state = "trains" if cohort["trains"] else "split"
        if cohort["merged_into"] is not None:
            state = "merged"
        who = "" if cohort["members"] is None else f", {cohort['members']:.0f} members"
        why = ""
        if cohort["trains"] and cohort["evidence"]:
            why = f": {cohort['evidence']['verdict']}"
        text.append(f"{'  ' * depth}cohort {cohort['name']} ({state}{who}){why}")
    text += ["  ".join(_event_row(event, facts)) for event in told(facts)]
    blocked = sum(event["event"] == "blocked" for event in facts["events"])
    text.append(
        f"{facts['records']} clients known, {blocked} blocked,"
        f" {facts['wasted_updates']} updates on probation or at anchors not folded"
    )
    return text


def tree_plot(facts: Facts) -> Plot:
    """Cohorts by round of birth and depth; circles grow with the members."""
    figure, axes = new_figure()
    places = _places(facts["cohorts"])
    largest = max((c["members"] or 0.0 for c in facts["cohorts"]), default=0.0) or 1.0
    for cohort in facts["cohorts"]:
        x, y = places[cohort["cohort"]]
        if cohort["parent"] >= 0:
            px, py = places[cohort["parent"]]
            axes.plot([px, x, x], [py, py, y], color=series_color(4), linewidth=1)
        size = 60 + 500 * (cohort["members"] or 0.0) / largest
        color = series_color(0 if cohort["trains"] else 4)
        axes.scatter([x], [y], s=size, color=color, zorder=3)
        label = cohort["name"]
        if cohort["members"] is not None:
            label += f"\n{cohort['members']:.0f}"
        # The line to the children leaves an inner cohort to the right, so that its name is above.
        offset, align = ((16, 0), "center") if cohort["trains"] else ((6, 6), "bottom")
        axes.annotate(
            label, (x, y), xytext=offset, textcoords="offset points", fontsize=9, va=align,
            color=INK,
        )  # fmt: skip
    axes.set_xlabel("round in which the cohort began")
    axes.set_yticks([])
    axes.margins(x=0.15, y=0.2)
    left, right = axes.get_xlim()
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= right])
    axes.set_xlim(left, right)
    return Plot(
        title="Tree of cohorts",
        caption="Blue cohorts train, grey ones have split or merged; below the name, the members.",
        figure=figure,
    )


def _places(cohorts: list[Facts]) -> dict[int, tuple[float, float]]:
    """Birth on the x axis; leaves one below the other, parents in the middle of their children."""
    children: dict[int, list[int]] = {}
    for cohort in cohorts:
        children.setdefault(cohort["parent"], []).append(cohort["cohort"])
    height: dict[int, float] = {}

    def place(number: int) -> float:
        own = children.get(number, [])
        if own:
            height[number] = sum(place(child) for child in own) / len(own)
        else:
            height[number] = -float(sum(node not in children for node in height))
        return height[number]

    place(0)
    return {c["cohort"]: (float(c["born"]), height[c["cohort"]]) for c in cohorts}


def _depth_first(cohorts: list[Facts]) -> list[Facts]:
    return sorted(cohorts, key=lambda c: [int(step) for step in c["name"].split(".")])


def _cohort_row(cohort: Facts) -> list[str]:
    verdict = cohort["evidence"]["verdict"] if cohort["evidence"] else "no decision yet"
    participants = cohort["participants"]
    shown = "" if participants is None else f"{participants:.1f}"
    return [cohort["name"], str(cohort["born"]), f"{cohort['members']:.0f}", shown, verdict]


def _event_row(event: Facts, facts: Facts) -> list[str]:
    names = {cohort["cohort"]: cohort["name"] for cohort in facts["cohorts"]}
    name = names.get(event["cohort"], str(event["cohort"]))
    round_id = str(event["round"])
    if event["event"] == "split":
        into = ", ".join(names.get(n, str(n)) for n in event["into"])
        return [round_id, f"{name} split into {into}", _evidence(event["evidence"])]
    if event["event"] == "merged":
        return [round_id, f"{name} merged into {names.get(event['into'], '?')}", "too small"]
    return [round_id, f"{name} re-opened", f"{100 * event['rejected']:.0f} % of members rejected"]


def _evidence(found: Facts) -> str:
    stability = ", ".join(f"K={k}: {value:.2f}" for k, value in found["stability"].items())
    spread = found["dispersion"]
    gate = "too small to judge"
    if spread["total"] is not None and (spread["total_low"] or 0) > 0:
        gate = f"{spread['within'] / spread['total']:.2f} of the whole is left inside"
    return (
        f"stability {stability}; agreement {found['agreement']:.2f}; coverage"
        f" {found['coverage']:.2f}; dispersion {gate}; {found['participants']:.0f} participants"
    )
