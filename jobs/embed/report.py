"""The page of a training run: quality along the stream, bytes, and who got how long a row."""

from __future__ import annotations

from typing import Any

from raysys.report import Cell, Plot, Section, Table, new_figure, render_page
from raysys.runs import RunDirectory

REPORT = "report.html"


def write_report(run: RunDirectory, result: dict[str, Any]) -> list[str]:
    """Write ``report.html`` and ``result.json`` from the windows and the final state.

    Returns:
        The result in a few lines.
    """
    windows = read_windows(run)
    late = windows[-max(1, len(windows) // 5) :]
    weight = sum(w["samples"] for w in late)
    stats = result["stats"]
    summary = {
        "steps": result["steps"],
        "auc_late": sum(w["auc"] * w["samples"] for w in late) / weight,
        "log_loss_late": sum(w["log_loss"] * w["samples"] for w in late) / weight,
        "drifts": [w["step"] for w in windows if w.get("drift")],
        **{name: stats[name] for name in ("rho", "rho_bytes", "mapped_bytes", "rows", "alive")},
    }
    run.write_json("result.json", summary | {"shapes": result.get("shapes", {})})
    lines = [
        f"AUC {summary['auc_late']:.4f}, log-loss {summary['log_loss_late']:.4f} over the last "
        f"fifth of {result['steps']} steps (predicted before training)",
        f"{stats['rows']:,.0f} ids own {stats['alive']:,.0f} chunks: {stats['rho']:.1%} of chunks "
        f"pruned, {stats['rho_bytes']:.1%} of bytes with the index",
    ]
    plots = [_quality_plot(windows), _bytes_plot(windows)]
    if result.get("shapes"):
        plots.append(_length_plot(result["shapes"]))
    sections = [
        Section(title="Along the stream", plots=plots),
        Section(title="At the end", tables=[_table(summary, result.get("shapes", {}))]),
    ]
    page = render_page("Click model with rows of fitting length", " ".join(lines), sections)
    run.storage.write(REPORT, page.encode())
    return lines


def read_windows(run: RunDirectory) -> list[dict[str, Any]]:
    """The windows in order; those that a resumed run went through again count once, the later."""
    rows = run.read_table("windows").to_pylist()
    by_step = {row["step"]: row for row in rows}
    return [by_step[step] for step in sorted(by_step)]


def _quality_plot(windows: list[dict[str, Any]]) -> Plot:
    figure, axes = new_figure(1, 2, width=8.5)
    steps = [w["step"] for w in windows]
    axes[0].plot(steps, [w["auc"] for w in windows])
    axes[0].set_ylabel("AUC")
    axes[1].plot(steps, [w["normalised_entropy"] for w in windows])
    axes[1].set_ylabel("normalised entropy")
    for part in axes:
        part.set_xlabel("step")
        for window in windows:
            if window.get("drift"):
                part.axvline(window["step"], linestyle=":", linewidth=1)
    return Plot(
        title="Quality, predicted before training",
        caption="Each point is one window of the stream. Dotted lines are detected drifts.",
        figure=figure,
    )


def _bytes_plot(windows: list[dict[str, Any]]) -> Plot:
    figure, axes = new_figure()
    steps = [w["step"] for w in windows]
    axes.plot(steps, [w["rho"] for w in windows], label="of chunks")
    axes.plot(steps, [w["rho_bytes"] for w in windows], label="of bytes, index included")
    axes.set_xlabel("step")
    axes.set_ylabel("share pruned")
    axes.set_ylim(-0.5, 1.02)
    axes.legend()
    return Plot(
        title="Share pruned of what the ids seen so far would take",
        caption="Chunks are what publications count; bytes are what the machine holds. "
        "While few ids have been seen, fixed parts outweigh them: the curve is below the picture.",
        figure=figure,
    )


def _length_plot(found: dict[str, Any]) -> Plot:
    figure, axes = new_figure()
    for name, shape in list(found.items())[:6]:
        counts = shape["rows_by_length"][1:]
        axes.plot(range(1, len(counts) + 1), [max(c, 0.5) for c in counts], marker="o", label=name)
    axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("row length in chunks")
    axes.set_ylabel("ids")
    axes.legend()
    return Plot(
        title="Row lengths by field",
        caption="Ids that own memory, by the number of chunks they own; the first six fields.",
        figure=figure,
    )


def _table(summary: dict[str, Any], found: dict[str, Any]) -> Table:
    rows: list[list[str | Cell]] = [
        ["AUC, last fifth", Cell(text=f"{summary['auc_late']:.4f}", number=True)],
        ["log-loss, last fifth", Cell(text=f"{summary['log_loss_late']:.4f}", number=True)],
        ["mapped MB", Cell(text=f"{summary['mapped_bytes'] / 1e6:.2f}", number=True)],
        ["drifts at steps", ", ".join(str(int(s)) for s in summary["drifts"]) or "none"],
    ]
    for name, shape in found.items():
        kept = ", ".join(f"{share:.0%}" for share in shape["kept_by_column"])
        ids = sum(shape["rows_by_length"])
        rows.append([f"{name}: {ids:,} ids; rows that keep each chunk", kept])
    return Table(headers=["measure", "value"], rows=rows)
