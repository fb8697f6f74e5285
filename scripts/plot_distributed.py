#!/usr/bin/env python3
"""Draws what bench_distributed.py measured, from its CSV alone.

    python scripts/plot_distributed.py scripts/results/distributed.csv scripts/results/distributed.png [--gpus N]

Above: dense cases in TFLOP/s a GPU, and the others in milliseconds (forward), ours beside others, of the largest number
of GPUs that the file has, or --gpus. Below: efficiency by the number of GPUs, weak and strong, of the largest job.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import in_a_folder, positive, read_rows

# Okabe and Ito's colours ("Color Universal Design", 2008), which the colour-blind can tell apart.
OURS, OURS_OTHERWISE = "#0072B2", "#7FB5DA"
OTHERS = ("#E69F00", "#F0C987", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999")
MARKS = "osD^vPX"
Rows = Sequence[dict[str, str]]


def draw(rows: Rows, path: Path, gpus: int | None = None) -> None:
    """A PNG of rows as `measuring.read_rows` gives them.

    gpus: of which jobs; None: those with most.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    gpus = gpus or max(int(row["gpus"]) for row in rows)
    rows = [row for row in rows if int(row["gpus"]) == gpus]
    beside = [row for row in rows if row["mode"] == "peers"]
    scaling = [row for row in rows if row["mode"] == "scaling"]
    dense = [row for row in beside if "dense" in row["case"]]
    sparse = [row for row in beside if "dense" not in row["case"] and row["way"] == "forward"]
    colours = colours_of(beside)
    figure, axes = pyplot.subplots(2, 2, figsize=(17, 10), layout="constrained", width_ratios=(1.5, 1))
    bars(axes[0, 0], dense, "tflops", colours, "TFLOP/s a GPU", "%.0f")
    bars(axes[0, 1], sparse, "ms", colours, "ms forward, log scale (less is better)", "%.3g")
    if sparse:
        axes[0, 1].set_yscale("log")
        axes[0, 1].yaxis.set_major_formatter("{x:g}")
        axes[0, 1].yaxis.set_minor_formatter("{x:g}" if spread(sparse) < 10 else "")
        axes[0, 1].tick_params(axis="y", which="minor", labelsize=7)
    for axis, kind in ((axes[1, 0], "weak"), (axes[1, 1], "strong")):
        lines(axis, [row for row in scaling if row["case"].startswith(kind)], kind)
    handles = {
        label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(handles.values(), handles, ncols=3, frameon=False, loc="outside upper center")
    device, torch = rows[0]["device"], rows[0]["torch"]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    figure.supxlabel(f"{gpus} x {device}, bfloat16, head_dim 128, torch {torch}, commits {commits}", fontsize=9)
    figure.savefig(path, dpi=130)


def colours_of(rows: Rows) -> dict[str, str]:
    """Ours is always the same, paler with a schedule that was asked for; others in the order in which they come."""
    names = dict.fromkeys(["distattn", *(row["contender"] for row in rows)])
    mine = {name: OURS_OTHERWISE for name in names if name.startswith("distattn, ")}
    others = [name for name in names if name not in mine and name != "distattn"]
    return {"distattn": OURS} | mine | {name: OTHERS[at % len(OTHERS)] for at, name in enumerate(others)}


def spread(rows: Rows) -> float:
    times = [float(row["ms"]) for row in rows]
    return max(times) / min(times)


def bars(axis: Any, rows: Rows, column: str, colours: dict[str, str], title: str, form: str) -> None:
    """A group for each case and way, a bar for each contender that was measured in it, side by side."""
    groups: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:  # later rows, of repeated jobs, take the place of earlier ones
        groups.setdefault((row["case"], row["way"]), {})[row["contender"]] = float(row[column])
    at = 0.0
    ticks = []
    for values in groups.values():
        for number, (name, colour) in enumerate((n, c) for n, c in colours.items() if n in values):
            bar = axis.bar(at + number, values[name], 0.92, color=colour, label=name, edgecolor="white")
            axis.bar_label(bar, fmt=form, fontsize=7)
        ticks.append(at + (len(values) - 1) / 2)
        at += len(values) + 1
    several = len({way for _, way in groups}) > 1
    labels = [(case + (f", {way}" if several else "")).replace("+", "\n+").replace(", ", "\n") for case, way in groups]
    axis.set_xticks(ticks, labels, fontsize=8)
    axis.set_title(title, fontsize=11, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


def lines(axis: Any, rows: Rows, kind: str) -> None:
    """Efficiency by the number of GPUs: a line for each case, with a backward pass a dashed one."""
    series: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        series.setdefault((row["case"], row["way"]), {})[int(row["ranks"])] = float(row["efficiency"])
    cases = list(dict.fromkeys(case for case, _ in series))
    for (case, way), values in series.items():
        at = cases.index(case)
        xs = sorted(values)
        style = "-" if way == "forward" else "--"
        colour = [OURS, *OTHERS][(0, 5, 3)[at % 3]]
        label = f"{case.partition(', ')[2]}, {way}"
        axis.plot(xs, [100 * values[x] for x in xs], style, color=colour, marker=MARKS[at % len(MARKS)], label=label)
    axis.set_title(f"{kind} scaling: FLOP/s a GPU, % of one GPU", fontsize=11, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    if not series:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes)
        return
    ranks = sorted({x for values in series.values() for x in values})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ranks, [str(x) for x in ranks])
    axis.minorticks_off()
    axis.axhline(100, color="#999999", linewidth=0.8)
    lowest = min(min(values.values()) for values in series.values())
    axis.set_ylim(min(70.0, 100 * lowest - 5), 105)
    axis.set_xlabel("GPUs")
    axis.legend(frameon=False, fontsize=8, loc="lower left")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="what bench_distributed.py wrote")
    parser.add_argument("png", type=in_a_folder, help="where to draw it")
    parser.add_argument("--gpus", type=positive, help="of which jobs (default: those with most)")
    arguments = parser.parse_args()
    rows = read_rows(arguments.csv)
    if not [row for row in rows if arguments.gpus in (None, int(row["gpus"]))]:
        parser.error(f"{arguments.csv} has no rows of {arguments.gpus or 'any'} GPUs")
    draw(rows, arguments.png, arguments.gpus)
    return 0


if __name__ == "__main__":
    sys.exit(main())
