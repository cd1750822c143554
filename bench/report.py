"""Tables of what was measured, in plain text or in Markdown."""

from __future__ import annotations

import statistics


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.1f}" if seconds < 1 else f"{seconds * 1000:,.0f}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


COLUMNS = [  # title, figure, how to write it
    ("output tok/s", "output_throughput", "{:,.1f}".format),
    ("total tok/s", "total_throughput", "{:,.0f}".format),
    ("TTFT p50", "ttft_p50", _ms), ("p95", "ttft_p95", _ms), ("TPOT p50", "tpot_p50", _ms),
    ("ITL p50", "itl_p50", _ms), ("p95", "itl_p95", _ms), ("p99", "itl_p99", _ms),
    ("memory MB", "peak_memory_bytes", lambda x: f"{x / 1e6:,.0f}"),
    ("cached", "prefix_hit_rate", _share), ("preempt", "preemptions", "{:.0f}".format),
]


def print_table(rows: list[list[str]], markdown: bool = False) -> None:
    """Columns as wide as they need; the first to the left, the others to the right."""
    if markdown:
        rows = [*rows[:1], ["---"] + ["---:"] * (len(rows[0]) - 1), *rows[1:]]
        print("\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n")
        return
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    for row in rows:
        print("  " + "  ".join(cell.rjust(w) if i else cell.ljust(w)
                               for i, (cell, w) in enumerate(zip(row, widths))))


def print_limits(limits: dict) -> None:
    """The machine, in a line."""
    threads = f", {limits['threads']} thread(s)" if limits["threads"] else ""
    print(f"{limits['device_name']}{threads}, {limits['dtype']}, torch {limits['torch']}, "
          f"transformers {limits['transformers']}, memory {limits['bandwidth'] / 1e9:.1f} GB/s")


def print_record(record: dict, markdown: bool = False) -> None:
    """A workload's table: medians, and the spread of the throughput."""
    limits, want = record["limits"], record["output_tokens"]
    print(f"\n{record['model']} · {record['workload']} · {record['requests']} requests, "
          f"{record['prompt_tokens']:,} prompt and {want:,} output tokens")
    rows = [["(times in ms)", *(title for title, *_ in COLUMNS), "of ceiling", "same tokens"]]
    notes = []
    for name, entry in record["engines"].items():
        if "summary" not in entry:
            rows.append([name, "failed"])
            continue
        summary, runs = entry["summary"], entry["runs"]
        cells = [write(summary[key]["median"]) if summary.get(key) else "-"
                 for _, key, write in COLUMNS]
        rate = summary["output_throughput"]
        cells[0] += f" ({rate['min']:,.0f}-{rate['max']:,.0f})" if len(runs) > 1 else ""
        rows.append([name, *cells, _share(summary["share_of_ceiling"]),
                     _share(summary["same_tokens"]["share"])])
        if any(run["was_cut"] for run in runs):
            done = statistics.median(run["output_tokens"] for run in runs)
            notes.append(f"  {name} was cut at its time limit after {done:,.0f} of {want:,} "
                         "tokens: the rates are of what it did")
    print_table(rows, markdown)
    if notes:
        print("\n".join(notes))
    if record["ceiling_output_throughput"]:
        print(f"  ceiling {record['ceiling_output_throughput']:,.0f} output tok/s: weights "
              f"{limits['weight_bytes'] / 1e6:,.1f} MB a pass and {limits['kv_bytes_per_token']:,} "
              f"bytes a cached token, at {limits['bandwidth'] / 1e9:.1f} GB/s")


def print_ablation(record: dict, markdown: bool = False) -> None:
    """A feature with and without, figure by figure."""
    case, (on, off) = record["ablation"], record["engines"].values()
    print(f"\n{case['feature']} · {record['model']} · {record['workload']}, "
          f"{record['requests']} requests\n  with {case['on'] or 'defaults'}, "
          f"without {case['off'] or 'defaults'}")
    if "summary" not in on or "summary" not in off:
        print(f"  failed: {on['error'] or off['error']}")
        return
    rows = [["", "with", "without", "without / with"]]
    for name in case["figures"]:
        values = [entry["summary"][name]["median"] for entry in (on, off)]
        is_time = name.startswith(("ttft", "itl", "tpot"))
        write = (lambda x: f"{x * 1000:,.1f} ms") if is_time else "{:,.0f}".format
        ratio = f"{values[1] / values[0]:.2f}" if values[0] else "-"
        rows.append([name.replace("_", " "), *map(write, values), ratio])
    rows.append(["same tokens", "", _share(off["summary"]["same_tokens"]["share"]), ""])
    print_table(rows, markdown)
