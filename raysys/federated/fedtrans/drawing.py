"""The genealogy of a family and the reasons for its growth, for reports and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raysys.report import Plot, Section, Table, new_figure, series_color
from raysys.report.figures import INK

Facts = Mapping[str, Any]


def family_section(facts: Facts, title: str = "Family of models") -> Section:
    """A report's section, from :func:`raysys.federated.fedtrans.explain.explain`."""
    members = Table(
        headers=["model", "cells", "MACs a sample", "parameters", "can run it", "served by it",
                 "share of the last participants"],
        rows=[_member_row(member) for member in facts["family"]],
    )  # fmt: skip
    decisions = Table(
        headers=["round", "what", "why then", "why there"],
        rows=[_decision_row(entry) for entry in facts["decisions"]] or [["-"] * 4],
    )
    return Section(title=title, plots=[genealogy(facts)], tables=[members, decisions])


def lines(facts: Facts) -> list[str]:
    """The same for a terminal: the members, then what was decided and why."""
    text = []
    for member in facts["family"]:
        name, cells, macs, params, able, served, share = _member_row(member)
        text.append(
            f"{name}: {cells}; {macs} MACs, {params} parameters; {able} clients can run it,"
            f" {served} are served by it, {share} of the last participants"
        )
    text += ["  ".join(_decision_row(entry)) for entry in facts["decisions"]]
    text.append(f"now: {facts['now']}")
    if facts["too_weak"]:
        text.append(
            f"{facts['too_weak']} clients cannot run M0: they never train, M0 is what they are sent"
        )
    return text


def genealogy(facts: Facts) -> Plot:
    """One line a model from its birth on, the larger the higher; links lead to the parents."""
    family: Sequence[Facts] = facts["family"]
    figure, axes = new_figure(height=max(2.2, 0.42 * len(family) + 1.2))
    order = sorted(range(len(family)), key=lambda k: (family[k]["macs"], k))
    height = {model: place for place, model in enumerate(order)}
    end = max(facts["round"], 1)
    most = max((member["served"] for member in family), default=0) or 1
    for member in family:
        y, born = height[member["model"]], member["born"]
        gone = member["retired"]
        color = series_color(0 if gone is None else 4)
        axes.plot([born, end if gone is None else gone], [y, y], color=color, linewidth=2)
        if member["parent"] is not None:
            link = [height[member["parent"]], y]
            axes.plot([born, born], link, color=series_color(4), linewidth=1, zorder=1)
        size = 20 + 280 * member["served"] / most
        axes.scatter([born], [y], s=size, color=color, zorder=3)
        note = f"{member['served']} clients" if gone is None else "retired"
        axes.annotate(
            note, (end if gone is None else gone, y), xytext=(6, 0), textcoords="offset points",
            fontsize=9, va="center", color=INK,
        )  # fmt: skip
    axes.set_yticks(range(len(order)), [f"M{k}  {family[k]['macs']:,} MACs" for k in order])
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("round")
    axes.margins(x=0.06, y=0.15)
    axes.set_xlim(right=end * 1.16)
    return Plot(
        title="Genealogy of models",
        caption=(
            "A line begins where a model was derived from the one that its link leads to. Circles"
            " grow with the clients that are served by the model."
        ),
        figure=figure,
    )


def _member_row(member: Facts) -> list[str]:
    name = f"M{member['model']}"
    if member["parent"] is not None:
        name += f" (from M{member['parent']}, round {member['born']})"
    if member["retired"] is not None:
        name += f", retired in round {member['retired']}"
    return [
        name,
        member["cells"],
        f"{member['macs']:,}",
        f"{member['params']:,}",
        str(member["able"]),
        str(member["served"]),
        f"{100 * member['share']:.0f} %",
    ]


def _decision_row(entry: Facts) -> list[str]:
    parent = f"M{entry['parent']}"
    if entry["child"] is None:
        what = f"{parent} stays as it is: nothing larger fits"
    else:
        made = " and ".join(entry["made"])
        grown = entry["macs_after"] / entry["macs_before"]
        what = f"M{entry['child']} from {parent}: {made}; {grown:.2f} times the MACs"
    if entry["dropped"]:
        what += f"; cells {entry['dropped']} left out, or it would not fit"
    activeness = ", ".join(f"{value:.3g}" for value in entry["activeness"])
    return [str(entry["round"]), what, entry["why"], f"activeness of the cells {activeness}"]
