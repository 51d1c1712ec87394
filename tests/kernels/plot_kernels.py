"""Draw what bench_cross_entropy.py and bench_updates.py measured: time of the loss, and speed of the update.

python tests/kernels/plot_kernels.py LOSS_ROWS.jsonl UPDATE_ROWS.jsonl PICTURE.svg
"""

import json
import sys
from pathlib import Path

LOSS_NAMES = {"products_before": "three matrix products", "ours": "linear_cross_entropy", "liger": "Liger"}
UPDATE_NAMES = {"adamw_split": "fp32 moments", "adamw_split_8bit": "8-bit moments"}


def read(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def draw_loss(axes, rows: list[dict]) -> None:
    tokens = sorted({row["tokens"] for row in rows})
    for number, (implementation, label) in enumerate(LOSS_NAMES.items()):
        found = {row["tokens"]: row for row in rows if row["implementation"] == implementation}
        for place, count in enumerate(tokens):
            if count not in found:
                continue
            row, left = found[count], place + 0.27 * number
            spread = [[row["p50_ms"] - row["p20_ms"]], [row["p80_ms"] - row["p50_ms"]]]
            name = label if place == 0 else None
            axes.bar(left, row["p50_ms"], 0.25, color=f"C{number}", label=name, yerr=spread, capsize=2)
            axes.annotate(f"{row['p50_ms']:.0f}", (left, row["p50_ms"]), ha="center", va="bottom", fontsize=7)
    axes.set_xticks([place + 0.27 for place in range(len(tokens))], [f"{count:,}" for count in tokens])
    first = rows[0]
    axes.set_title(
        f"head and loss, {first['hidden']:,} x {first['vocabulary']:,}, {first['device']}", fontsize=9
    )
    axes.set(xlabel="tokens", ylabel="ms, forward and gradients")
    axes.legend(fontsize=8)


def draw_update(axes, rows: list[dict]) -> None:
    series = sorted(
        {(row["operation"], row["isa"]) for row in rows if row["operation"] in UPDATE_NAMES and "isa" in row}
    )
    for number, (operation, isa) in enumerate(series):
        found = [row for row in rows if (row["operation"], row.get("isa")) == (operation, isa)]
        found.sort(key=lambda row: row["threads"])
        axes.plot(
            [row["threads"] for row in found],
            [row["gparam_per_s"] for row in found],
            marker="o",
            color=f"C{number}",
            label=f"{UPDATE_NAMES[operation]}, {isa}",
        )
    axes.set_title("AdamW on the CPU, split master", fontsize=9)
    axes.set(xlabel="threads", ylabel="10$^9$ parameters per second", ylim=(0, None))
    axes.legend(fontsize=8)


def main(loss_rows: str, update_rows: str, picture: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    draw_loss(left, read(loss_rows))
    draw_update(right, read(update_rows))
    figure.tight_layout()
    figure.savefig(picture, metadata={"Date": None} if picture.endswith(".svg") else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
