#!/usr/bin/env python
"""Draw the tokens per second of benchmark rows as bars: one group a batch size, one bar a kind of clipping.

Example:
    python tests/bench/plot_throughput.py docs/benchmarks/ROWS.jsonl docs/benchmarks/ROWS.svg
"""

import argparse
import json
from pathlib import Path


def read_rows(path: Path) -> dict[str, dict[int, dict]]:
    """Rows by series ("no clipping", ...) and batch size; the last row of a pair counts."""
    series: dict[str, dict[int, dict]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["error"] is None:
            clipping = row["config"]["max_grad_norm"]
            name = f"clipped at {clipping:g}" if clipping else "no clipping"
            series.setdefault(name, {})[row["config"]["batch_size"]] = row
    return series


def draw(series: dict[str, dict[int, dict]], output: Path) -> None:
    """Write the picture; whiskers span the 20th to the 80th percentile of a step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    batches = sorted({batch for rows in series.values() for batch in rows})
    figure, axes = plt.subplots(figsize=(7, 4))
    width = 0.8 / len(series)
    first = next(iter(next(iter(series.values())).values()))
    for number, (name, rows) in enumerate(sorted(series.items())):
        for place, batch in enumerate(batches):
            row = rows.get(batch)
            if row is None:
                continue
            value = row["tokens_per_s"]
            low, high = (row["tokens_per_step"] / row[f"step_s_p{p}"] for p in (80, 20))
            axes.bar(
                place + number * width,
                value,
                width,
                color=f"C{number}",
                label=name if place == 0 else None,
                yerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
                capsize=3,
            )
            axes.annotate(
                f"{value:,.0f}", (place + number * width, value), ha="center", va="bottom", fontsize=8
            )
    axes.set_xticks(
        [place + width * (len(series) - 1) / 2 for place in range(len(batches))], map(str, batches)
    )
    axes.set_xlabel(f"batch size (sequences of {first['config']['seq_len']} tokens)")
    axes.set_ylabel("tokens per second")
    axes.set_title(f"{first['config']['shape']}, every layer streamed, {first['gpu']}", fontsize=10)
    axes.margins(y=0.12)
    axes.legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    draw(read_rows(args.rows), args.output)


if __name__ == "__main__":
    main()
