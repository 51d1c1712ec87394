#!/usr/bin/env python
"""Were the plans right? Compares benchmark rows with what their plans said before the start.

Prints one line a row: peaks on the GPU and in RAM and seconds of a step, measured and planned. The exit status is 1 if
a peak exceeds its plan, a plan exceeds its peak by more than 3 %, or a step is not within 10 % of its prediction.

Example:
    python tests/bench/check_plan.py docs/benchmarks/ROWS.jsonl
"""

import argparse
import json
import sys
from pathlib import Path

MOST_OVER = 1.03  # planned over measured bytes
TIME_WITHIN = 0.10
GIB = 2**30


def compare(row: dict) -> tuple[str, bool]:
    """Return a line on one row, and whether its plan was right; rows on the CPU have no GPU peak of their own."""
    plan, config = row["plan"], row["config"]
    planned = plan["peaks"]["train"]
    parts, right = [], True
    for label, measured, bound in (
        ("GPU", row["gpu_peak_allocated_bytes"], planned["GPU"]),
        ("RAM", row["host_bytes"], planned["RAM"]),
        ("disk", row.get("disk_bytes"), planned.get("disk")),
    ):
        if not measured:
            continue
        # Pages and blocks: what is nearly nothing may be off by more than a part of it.
        fits = measured <= bound + 2**20 and bound <= MOST_OVER * measured + 2**20
        right &= fits
        parts.append(
            f"{label} {measured / GIB:6.2f} of {bound / GIB:6.2f} GiB ({bound / measured:.3f})"
            + ("" if fits else " WRONG")
        )
    prediction = plan.get("prediction")
    if prediction is not None:
        measured_s, predicted_s = row["step_s_p50"], prediction["step_s"]
        fits = abs(predicted_s / measured_s - 1) <= TIME_WITHIN
        right &= fits
        parts.append(
            f"step {measured_s:.3f} s, predicted {predicted_s:.3f} s ({predicted_s / measured_s - 1:+.1%}), "
            f"bound by {prediction['bound_by']}" + ("" if fits else " WRONG")
        )
    clipping = f"clip {config['max_grad_norm']:g}" if config["max_grad_norm"] else "no clipping"
    name = (
        f"{config['shape']} b{config['batch_size']} x {config['seq_len']}, {clipping}, {config['placement']}"
    )
    speed = f"{row['tokens_per_s']:,.0f} tok/s"
    return f"{name}: {speed}; {'; '.join(parts)}", right


def main(argv: list[str] | None = None) -> int:
    """Compare every row that has a plan; return 1 if one of them was wrong, or if there is none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="+", help="files with a JSON row a line")
    args = parser.parse_args(argv)
    results = []
    for path in args.rows:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["error"] is None and (row.get("plan") or {}).get("peaks"):
                text, right = compare(row)
                print(text)
                results.append(right)
    if not results:
        print("no row has a plan to compare with", file=sys.stderr)
    return int(not results or not all(results))


if __name__ == "__main__":
    sys.exit(main())
