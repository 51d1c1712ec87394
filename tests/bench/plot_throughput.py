#!/usr/bin/env python
"""Draw the tokens per second of benchmark rows as bars: one group a batch size, one bar a file and kind of clipping.

Examples:
    python tests/bench/plot_throughput.py docs/benchmarks/ROWS.jsonl docs/benchmarks/ROWS.svg
    python tests/bench/plot_throughput.py auto=AUTO.jsonl streamed=STREAM.jsonl PICTURE.svg \\
        --shape llama-3.1-8b --figures OTHERS.json --title "Llama-3.1-8B shapes, one H100"
"""

import argparse
import json
from pathlib import Path


def read_rows(path: Path, label: str = "", shape: str | None = None) -> dict[str, dict[int, dict]]:
    """Rows by series ("no clipping", ..., after the label) and batch size; the last row of a pair counts."""
    series: dict[str, dict[int, dict]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["error"] is None and shape in (None, row["config"]["shape"]):
            clipping = row["config"]["max_grad_norm"]
            name = f"clipped at {clipping:g}" if clipping else "no clipping"
            series.setdefault(f"{label}, {name}" if label else name, {})[row["config"]["batch_size"]] = row
    return series


def read_figures(path: Path) -> dict[str, dict[int, dict]]:
    """Series of which only tokens per second are known: `{"tokens_per_s": {NAME: {BATCH: N}}}`."""
    figures = json.loads(path.read_text(encoding="utf-8"))["tokens_per_s"]
    return {
        name: {int(batch): {"tokens_per_s": value} for batch, value in by_batch.items()}
        for name, by_batch in figures.items()
    }


def draw(series: dict[str, dict[int, dict]], output: Path, title: str | None = None) -> None:
    """Write the picture; whiskers, where steps are known, span the 20th to the 80th percentile of a step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    batches = sorted({batch for rows in series.values() for batch in rows})
    figure, axes = plt.subplots(figsize=(max(7, 2 * len(series)), 4))
    width = 0.8 / len(series)
    first = next(row for rows in series.values() for row in rows.values() if "config" in row)
    for number, (name, rows) in enumerate(sorted(series.items())):
        for place, batch in enumerate(batches):
            row = rows.get(batch)
            if row is None:
                continue
            value, spread, top = row["tokens_per_s"], None, row["tokens_per_s"]
            if "step_s_p20" in row:
                low, high = (row["tokens_per_step"] / row[f"step_s_p{p}"] for p in (80, 20))
                spread, top = [[max(0.0, value - low)], [max(0.0, high - value)]], max(value, high)
            axes.bar(
                place + number * width,
                value,
                width,
                color=f"C{number}",
                label=name if batch == min(rows) else None,
                yerr=spread,
                capsize=3,
            )
            axes.annotate(
                f"{value:,.0f}", (place + number * width, top), ha="center", va="bottom", fontsize=8
            )
    axes.set_xticks(
        [place + width * (len(series) - 1) / 2 for place in range(len(batches))], map(str, batches)
    )
    axes.set_xlabel(f"batch size (sequences of {first['config']['seq_len']} tokens)")
    axes.set_ylabel("tokens per second")
    axes.set_title(title or f"{first['config']['shape']}, every layer streamed, {first['gpu']}", fontsize=10)
    axes.margins(y=0.12)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=min(3, len(series)), frameon=False)
    figure.tight_layout()
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="+", metavar="[LABEL=]ROWS", help="files with a JSON row a line")
    parser.add_argument("output", type=Path)
    parser.add_argument("--shape", help="only rows of this shape")
    parser.add_argument("--figures", type=Path, help="JSON with tokens per second alone, of other systems")
    parser.add_argument("--title", help="instead of the first row's shape and GPU")
    args = parser.parse_args()
    series: dict[str, dict[int, dict]] = {}
    for item in args.rows:
        label, _, path = item.rpartition("=")
        series |= read_rows(Path(path), label, args.shape)
    if args.figures:
        series |= read_figures(args.figures)
    draw(series, args.output, args.title)


if __name__ == "__main__":
    main()
