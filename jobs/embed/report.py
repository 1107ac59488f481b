"""The page of a training run: quality along the stream, bytes, and who got how long a row."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.report import Cell, Plot, Section, Table, new_figure, render_page
from raysys.runs import RunDirectory

REPORT = "report.html"
_LIGHT, _DARK = (0.72, 0.85, 0.94), (0.05, 0.28, 0.47)


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
    run.write_json("result.json", summary | {"shapes": result["shapes"]})
    lines = [
        f"AUC {summary['auc_late']:.4f}, log-loss {summary['log_loss_late']:.4f} over the last "
        f"fifth of {result['steps']} steps (predicted before training)",
        f"{stats['rows']:,.0f} ids own {stats['alive']:,.0f} chunks: {stats['rho']:.1%} of chunks "
        f"pruned, {stats['rho_bytes']:.1%} of bytes with the index",
    ]
    recoveries = [recovery(windows, step) for step in summary["drifts"]]
    sections = [
        Section(
            title="Along the stream",
            plots=[_quality_plot(windows), _bytes_plot(windows)],
            tables=[_drift_table(recoveries)] if recoveries else [],
        ),
        Section(
            title="At the end",
            tables=[_table(summary, result["shapes"])],
            plots=[_length_plot(result["shapes"]), *_use_plots(np.asarray(result["by_use"]))],
        ),
    ]
    page = render_page("Click model with rows of fitting length", " ".join(lines), sections)
    run.storage.write(REPORT, page.encode())
    return lines


def read_windows(run: RunDirectory) -> list[dict[str, Any]]:
    """The windows in order; those that a resumed run went through again count once, the later."""
    rows = run.read_table("windows").to_pylist()
    by_step = {row["step"]: row for row in rows}
    return [by_step[step] for step in sorted(by_step)]


def recovery(windows: list[dict[str, Any]], step: float) -> dict[str, float | None]:
    """What a drift cost: mean AUC of the five windows before the fall, the lowest one until the
    next drift, and the step at which 90% of the difference was back (None: not yet).

    The detector needs some windows to be sure, so the fall is looked for from five windows before.
    """
    at = next(i for i, w in enumerate(windows) if w["step"] == step)
    first = max(0, at - 5)
    later = (i for i in range(at + 1, len(windows)) if windows[i].get("drift"))
    after = windows[first : next(later, len(windows))]
    before = [w["auc"] for w in windows[max(0, first - 5) : first]] or [windows[first]["auc"]]
    level = sum(before) / len(before)
    lowest = min(after, key=lambda w: float(w["auc"]))
    wanted = level - 0.1 * (level - lowest["auc"])
    back = (w["step"] for w in after if w["step"] > lowest["step"] and w["auc"] >= wanted)
    return {
        "step": step,
        "before": level,
        "lowest": lowest["auc"],
        "lowest_at": lowest["step"],
        "back_at": next(back, None),
    }


def _drift_table(found: list[dict[str, float | None]]) -> Table:
    rows: list[list[str | Cell]] = []
    for one in found:
        texts = [f"{one['step']:.0f}", f"{one['before']:.4f}", f"{one['lowest']:.4f}"]
        texts.append(f"{one['lowest_at']:.0f}")
        texts.append("not in this run" if one["back_at"] is None else f"{one['back_at']:.0f}")
        rows.append([Cell(text=text, number=True) for text in texts])
    headers = ["drift found at step", "AUC before", "lowest AUC", "at step", "90 % back at step"]
    return Table(headers=headers, rows=rows)


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


def _use_plots(counts: npt.NDArray[Any]) -> list[Plot]:
    """Share of rows by length, by how often a row was updated; nothing without rows."""
    used = [band for band in range(len(counts)) if counts[band].sum()]
    if not used:
        return []
    figure, axes = new_figure(height=3.8)
    shares = counts[used] / counts[used].sum(axis=1, keepdims=True)
    base, k = np.zeros(len(used)), counts.shape[1] - 1
    for length in range(1, k + 1):
        share = (length - 1) / max(k - 1, 1)
        color = tuple((1 - share) * light + share * dark for light, dark in zip(_LIGHT, _DARK))
        label = f"{length} of {k}" if length in (1, k) or k <= 8 else None
        axes.bar(range(len(used)), shares[:, length], 0.85, bottom=base, color=color, label=label)
        base = base + shares[:, length]
    names = ["1" if not b else f"{2**b:,} to {2 ** (b + 1) - 1:,}" for b in used]
    axes.set_xticks(range(len(used)), names, rotation=30, ha="right", fontsize=8)
    for place, band in enumerate(used):
        axes.text(place, 1.01, f"{counts[band].sum():,}", ha="center", fontsize=7)
    axes.set_ylim(0, 1.08)
    axes.set_xlabel("training batches with the id since it got memory")
    axes.set_ylabel("share of ids")
    axes.legend(title="chunks", fontsize=8, ncols=min(k, 8), loc="lower center",
                bbox_to_anchor=(0.5, 1.0))  # fmt: skip
    caption = (
        "Ids that own memory at the end, all fields. Above each bar: how many ids it stands for."
    )
    return [Plot(title="Row lengths by popularity", caption=caption, figure=figure)]


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
