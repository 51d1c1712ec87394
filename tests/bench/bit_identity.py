#!/usr/bin/env python
"""Is a streamed run bit-identical to one whose layers stay on the GPU?

Trains a slice of a model shape (as many layers as fit) twice from the same weights on the same tokens with
deterministic algorithms: once with every layer streamed, recomputed and updated on the CPU, once with every layer
and its optimizer state on the GPU, run by the model's own code with activations kept and updated by the Triton
kernel. Compares losses, gradient norms, and every weight, residual and moment bit by bit; prints one JSON row.

Example:
    python tests/bench/bit_identity.py --shape llama-3.1-8b --layers 4 --batch-size 4 --out rows.jsonl
"""

import argparse
import gc
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> int:
    """Run both; return 1 if a bit differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--commit")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    row = measure(args)
    line = json.dumps(row)
    print(line)
    if args.out:
        with args.out.open("a") as rows:
            rows.write(line + "\n")
    return 0 if row["identical"] else 1


def measure(args: argparse.Namespace) -> dict:
    """Train streamed and resident, compare, and return the row."""
    import torch
    from machine import describe_machine

    torch.use_deterministic_algorithms(True)
    streamed = train(args, resident=False)
    resident = train(args, resident=True)
    different = sorted(
        name
        for name in streamed["state"]
        if not torch.equal(streamed["state"][name], resident["state"][name])
    )
    row = describe_machine()
    if args.commit:
        row["commit"] = args.commit
    row["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    row["config"] = {key: value for key, value in vars(args).items() if key not in ("out", "commit")}
    row["losses_streamed"], row["losses_resident"] = streamed["losses"], resident["losses"]
    row["norms_streamed"], row["norms_resident"] = streamed["norms"], resident["norms"]
    row["tensors_compared"], row["tensors_different"] = len(streamed["state"]), different
    row["identical"] = (
        not different and streamed["losses"] == resident["losses"] and streamed["norms"] == resident["norms"]
    )
    return row


def train(args: argparse.Namespace, *, resident: bool) -> dict:
    """One run; returns losses, norms and all state as integer tensors in RAM."""
    import torch
    from throughput import build_config, build_model
    from transformers import set_seed

    from tests.engine.loop import bits, decide, prepare, tensors_of, train

    set_seed(0)
    on_gpu = torch.cuda.is_available()
    model = build_model(build_config(args), on_gpu)
    if args.liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    every = range(args.layers)
    run = prepare(
        model,
        device="cuda" if on_gpu else "cpu",
        accumulates=args.accumulation > 1,
        decisions=decide(resident=every, keep=every, units=args.layers) if resident else None,
        lr=1e-4,
    )
    train(
        run,
        args.steps,
        max_norm=args.max_grad_norm or None,
        micro_batches=args.accumulation,
        batch=args.batch_size,
        seq=args.seq_len,
    )
    state = {}
    for entry in run.engine.states:
        for key, tensor in tensors_of(entry).items():
            state[f"{entry.name}.{key}"] = bits(tensor).clone()
    result = {"losses": run.losses, "norms": run.norms, "state": state}
    run.engine.close()
    del run, model
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return result


if __name__ == "__main__":
    raise SystemExit(main())
