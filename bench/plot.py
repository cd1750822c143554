"""Figures of a report, in the notebooks' colours."""

from __future__ import annotations

import runpy
import sys
from types import SimpleNamespace

from bench.models import ROOT

PANELS = [  # figure, label, scale
    ("output_throughput", "output tokens/s", 1), ("ttft_p50", "TTFT p50, ms", 1000),
    ("itl_p99", "ITL p99, ms", 1000)]


def _pyplot():
    """matplotlib, and the colours of nbs/figures.py."""
    import matplotlib
    if "matplotlib.pyplot" not in sys.modules:
        matplotlib.use("agg")
    import matplotlib.pyplot as plt
    palette = SimpleNamespace(**runpy.run_path(str(ROOT / "nbs" / "figures.py")))
    palette.use_style()
    return plt, palette


def draw(records: list[dict]):
    """Throughput, time to first token and inter-token latency: a bar an engine, with the spread."""
    plt, palette = _pyplot()
    fig, axes = plt.subplots(len(records), len(PANELS), squeeze=False,
                             figsize=(palette.WIDTH, 0.7 + 1.5 * len(records)))
    for record, row in zip(records, axes):
        done = {n: e["summary"] for n, e in record["engines"].items() if "summary" in e}
        for ax, (name, label, scale) in zip(row, PANELS):
            for y, summary in enumerate(done.values()):
                if not (found := summary.get(name)):
                    continue
                middle = found["median"]
                low, high = found.get("min", middle), found.get("max", middle)
                ax.barh(y, middle * scale, color=palette.COLORS[y % 8], height=0.7,
                        xerr=[[(middle - low) * scale], [(high - middle) * scale]],
                        ecolor=palette.INK, capsize=2)
            ax.set(yticks=range(len(done)), yticklabels=done if ax is row[0] else [],
                   ylim=(len(done) - 0.4, -0.6), xlabel=label)
            ax.locator_params(axis="x", nbins=4)  # more would run into each other
        best = max((s["output_throughput"]["median"] for s in done.values()), default=0)
        if (ceiling := record["ceiling_output_throughput"]) and ceiling < 8 * best:
            row[0].axvline(ceiling, color=palette.RED, ls="--", lw=1)
        row[0].set_title(f"{record['model']} · {record['workload']}", fontsize=9)
    return fig


def draw_soak(result: dict):
    """Memory and blocks over the time of a soak."""
    plt, palette = _pyplot()
    samples, settle = result["samples"], result["settle"]
    x = [s["seconds"] for s in samples]
    names = [n for n in ("rss", "gpu_allocated", "gpu_reserved") if n in samples[-1]]
    fig, axes = plt.subplots(len(names) + 1, 1, sharex=True,
                             figsize=(palette.WIDTH, 1.4 * (len(names) + 1)))
    for ax, name in zip(axes, names):
        y = [s[name] / 1e6 for s in samples]
        base = next((v for t, v in zip(x, y) if t >= settle), y[-1])
        ax.axhspan(base * 0.98, base * 1.02, color=palette.tint(palette.GREEN, 0.7), lw=0)
        ax.plot(x, y, color=palette.BLUE)
        ax.set(ylabel="MB", ylim=(0, max(y) * 1.15),
               title=f"{name.replace('_', ' ')} (green: 2% around its value at {settle:.0f} s)")
    axes[-1].plot(x, [s["used_blocks"] for s in samples], color=palette.ORANGE, lw=1)
    axes[-1].set(xlabel="seconds", ylabel="blocks", ylim=(0, None),
                 title=f"blocks in use, of {result['num_blocks']}")
    return fig


def draw_report(report: dict):
    """The figure of a report, whichever kind it is."""
    if "soak" in report:
        return draw_soak(report["soak"])
    return draw(report.get("records") or report["ablations"])
