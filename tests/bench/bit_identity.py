#!/usr/bin/env python
"""Is a streamed run bit-identical to one whose layers stay on the GPU, or to one with everything on disk?

Trains a model shape, or as many of its layers as fit, twice from the same weights on the same tokens with
deterministic algorithms. First with every layer streamed, recomputed and updated on the CPU. Then, with `--against
resident`, with every layer and its optimizer state on the GPU, run by the model's own code with activations kept and
updated by the Triton kernel; or, with `--against disk`, with optimizer state, weights, gradients and inputs of every
layer on disk. Compares losses, gradient norms, and checksums of every weight, residual and moment; prints one JSON row.

For a disk the row also says how long the steps took and what the disk alone would have taken: the bytes that were read
and written over the rates that `slideformer probe --dir` measured there, one after the other.

Examples:
    python tests/bench/bit_identity.py --shape llama-3.1-8b --layers 4 --batch-size 4 --out rows.jsonl
    python tests/bench/bit_identity.py --shape qwen2.5-3b --steps 3 --against disk --nvme-dir /mnt/nvme --out rows.jsonl
"""

import argparse
import gc
import json
import os
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main(argv: list[str] | None = None) -> int:
    """Run both; return 1 if a bit differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--layers", type=int, help="number of layers instead of the shape's own")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--against", choices=("resident", "disk"), default="resident")
    parser.add_argument("--nvme-dir", help="where state lies, with --against disk")
    parser.add_argument("--commit")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if (args.against == "disk") != (args.nvme_dir is not None):
        parser.error("--against disk and --nvme-dir belong together")
    row = measure(args)
    line = json.dumps(row)
    print(line)
    if args.out:
        with args.out.open("a") as rows:
            rows.write(line + "\n")
    return 0 if row["identical"] else 1


def measure(args: argparse.Namespace) -> dict:
    """Train both ways, compare, and return the row."""
    import torch
    from measuring import describe_machine

    torch.use_deterministic_algorithms(True)
    streamed, other = run(args, "streamed"), run(args, args.against)
    different = sorted(name for name, value in streamed["state"].items() if other["state"].get(name) != value)
    row = describe_machine()
    if args.commit:
        row["commit"] = args.commit
    row["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    row["config"] = {key: value for key, value in vars(args).items() if key not in ("out", "commit")}
    for name, result in (("streamed", streamed), (args.against, other)):
        row |= {f"{key}_{name}": result[key] for key in ("losses", "norms", "seconds")}
    row["tensors_compared"], row["tensors_different"] = len(streamed["state"]), different
    row["identical"] = (
        streamed["state"] == other["state"]
        and streamed["losses"] == other["losses"]
        and streamed["norms"] == other["norms"]
    )
    if args.against == "disk":
        row["disk"] = other["disk"]
    return row


def run(args: argparse.Namespace, where: str) -> dict:
    """One run; returns losses, norms, seconds of all steps and checksums of all state."""
    import torch
    from throughput import build_config, build_model
    from transformers import set_seed

    from hf_slideformer import SlideConfig
    from hf_slideformer.engine.model.batch_shape import BatchShape
    from tests.engine.loop import batches, decide, prepare, step

    set_seed(0)
    on_gpu = torch.cuda.is_available()
    config = build_config(args)
    model = build_model(config, on_gpu)
    if args.liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    every = range(config.num_hidden_layers)
    decisions = {
        "streamed": None,
        "resident": decide(resident=every, keep=every, units=len(every)),
        "disk": decide(offload=every, on_disk=every, weights_on_disk=every, units=len(every)),
    }
    settings = {"nvme_dir": args.nvme_dir} if where == "disk" else {"placement": "stream"}
    if not on_gpu:
        settings["gpu_memory"] = "1GiB"  # so that activations are planned
    prepared = prepare(
        model,
        device="cuda" if on_gpu else "cpu",
        config=SlideConfig(**settings),
        accumulates=args.accumulation > 1,
        shape=BatchShape(args.batch_size, args.seq_len, "--batch-size and --seq-len"),
        decisions=decisions[where],
        lr=1e-4,
    )
    data = iter(
        batches(
            args.steps * args.accumulation, batch=args.batch_size, seq=args.seq_len, vocab=config.vocab_size
        )
    )
    prepared.model.train()
    engine, start = prepared.engine, time.perf_counter()
    before = engine.metrics.totals()
    for _ in range(args.steps):
        step(prepared, [next(data) for _ in range(args.accumulation)], max_norm=args.max_grad_norm or None)
    engine.synchronize()
    seconds = time.perf_counter() - start
    result = {"losses": prepared.losses, "norms": prepared.norms, "seconds": seconds}
    if where == "disk":
        result["disk"] = disk_floor(args, engine, before, seconds)
    result["state"] = checksums(engine)
    engine.close()
    del prepared, model, engine
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return result


def disk_floor(args: argparse.Namespace, engine, before: dict, seconds: float) -> dict:
    """What the disk moved in the steps, and the least time for that at its measured rates."""
    from hf_slideformer.machine.probe import hardware_of_this_machine

    after = engine.metrics.totals()
    read, written = (
        after[f"disk_{kind}_bytes"] - before.get(f"disk_{kind}_bytes", 0) for kind in ("read", "write")
    )
    hardware = hardware_of_this_machine(engine.device, args.nvme_dir)
    found = {
        "file_bytes": engine.disk_bytes,
        "read_bytes": read,
        "write_bytes": written,
        "read_rate": hardware.disk_read,
        "write_rate": hardware.disk_write,
        "floor_s": None,
        "times_floor": None,
    }
    if hardware.disk_read and hardware.disk_write:
        found["floor_s"] = read / hardware.disk_read + written / hardware.disk_write
        found["times_floor"] = seconds / found["floor_s"]
    return found


def checksums(engine) -> dict[str, int]:
    """CRC-32 of every weight, residual and moment."""
    from tests.engine.loop import bits, tensors_of

    found = {}
    with ThreadPoolExecutor() as threads:
        for states in engine.states_by_unit():
            with engine.state_in_memory(states):
                tensors = {
                    f"{state.name}.{key}": tensor
                    for state in states
                    for key, tensor in tensors_of(state).items()
                }
                sums = threads.map(lambda tensor: zlib.crc32(bits(tensor).view(-1).numpy()), tensors.values())
                found |= dict(zip(tensors, sums, strict=True))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
