"""How fast is the loss of a language model, against the three matrix products that it cannot do without?

Prints one JSON row for each number of tokens and implementation: the products alone (logits and both gradients,
bf16), before and after the others, since a GPU's clock changes as it warms up; ``linear_cross_entropy``, forward
and backward; and Liger Kernel's, if it is installed. The last two alternate. Without a GPU it runs on the CPU,
which shows only that it runs. Example: ``python tests/kernels/bench_cross_entropy.py --tokens 4096 --commit abc``.
"""

import argparse
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

from slideformer_kernels.cross_entropy import DEFAULT_MEMORY_BUDGET, linear_cross_entropy  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Step = Callable[[], torch.Tensor]


def make_operands(
    tokens: int, hidden: int, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make hidden states, weight and labels; the logits' standard deviation is about 1."""
    torch.manual_seed(0)
    states = torch.randn(tokens, hidden, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, hidden, device=DEVICE, dtype=torch.bfloat16) * hidden**-0.5
    labels = torch.randint(0, vocabulary, (tokens,), device=DEVICE)
    return states.requires_grad_(), weight.requires_grad_(), labels


def products_step(states: torch.Tensor, weight: torch.Tensor) -> Step:
    """Return the step that does the three products for all tokens at once, into buffers of its own."""
    states, weight = states.detach(), weight.detach()
    logits = torch.empty(states.shape[0], weight.shape[0], device=DEVICE, dtype=states.dtype)
    d_states, d_weight = torch.empty_like(states), torch.empty_like(weight)

    def step() -> torch.Tensor:
        torch.mm(states, weight.t(), out=logits)
        torch.mm(logits, weight, out=d_states)
        return torch.mm(logits.t(), states, out=d_weight)

    return step


def ours_step(states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, memory_budget: int) -> Step:
    def step() -> torch.Tensor:
        loss = linear_cross_entropy(states, weight, labels, memory_budget=memory_budget)
        loss.backward()
        return loss.detach()

    return step


def liger_step(states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> Step | None:
    if DEVICE == "cpu" or importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss_function = LigerFusedLinearCrossEntropyLoss()

    def step() -> torch.Tensor:
        loss = loss_function(weight, states, labels)
        loss.backward()
        return loss.detach()

    return step


def time_once(step: Step) -> float:
    """Return the milliseconds of one step; on the GPU, between events around it."""
    if DEVICE == "cpu":
        begin = time.perf_counter()
        step()
        return (time.perf_counter() - begin) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak_extra_bytes(step: Step) -> int | None:
    """Return the most memory that a step allocates on top of what there was, the gradients included."""
    if DEVICE == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def percentiles_ms(samples: list[float]) -> dict[str, float]:
    ordered = sorted(samples)
    return {f"p{p}_ms": round(ordered[round((len(ordered) - 1) * p / 100)], 4) for p in (20, 50, 80)}


def bench(tokens: int, options: argparse.Namespace) -> list[dict]:
    """Measure one number of tokens; returns its rows."""
    states, weight, labels = make_operands(tokens, options.hidden, options.vocabulary)
    memory_budget = options.memory_budget_mib * 2**20
    steps = {
        "ours": ours_step(states, weight, labels, memory_budget),
        "liger": liger_step(states, weight, labels),
    }
    steps = {name: step for name, step in steps.items() if step is not None}

    def run_clean(measure: Callable[[Step], object], step: Step) -> object:
        states.grad = weight.grad = None
        return measure(step)

    def time_products() -> dict[str, float]:
        products = products_step(states, weight)
        return percentiles_ms(
            [time_once(products) for _ in range(options.warmup + options.repeats)][options.warmup :]
        )

    common = {
        "tokens": tokens,
        "hidden": options.hidden,
        "vocabulary": options.vocabulary,
        "dtype": "bfloat16",
    }
    before = time_products()
    losses = {name: run_clean(lambda step: step().item(), step) for name, step in steps.items()}
    peaks = {name: run_clean(peak_extra_bytes, step) for name, step in steps.items()}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(options.warmup + options.repeats):
        for name, step in steps.items():
            sample = run_clean(time_once, step)
            if index >= options.warmup:
                samples[name].append(sample)
    states.grad = weight.grad = None
    after = time_products()

    products_ms = (before["p50_ms"] + after["p50_ms"]) / 2
    rows = [
        {"implementation": f"products_{when}", **common, **x}
        for when, x in (("before", before), ("after", after))
    ]
    for name in steps:
        times = percentiles_ms(samples[name])
        rows.append(
            {
                "implementation": name,
                **common,
                **times,
                "ratio_to_products": round(times["p50_ms"] / products_ms, 4),
                "peak_extra_bytes": peaks[name],
                "weight_grad_bytes": weight.numel() * weight.element_size(),
                "loss": losses[name],
            }
        )
        if name == "ours":
            rows[-1]["memory_budget_bytes"] = memory_budget
    return rows


def environment(commit: str | None) -> dict[str, str | None]:
    versions = {}
    for package in ("torch", "triton", "liger-kernel"):
        try:
            versions[package.replace("-", "_")] = version(package)
        except PackageNotFoundError:
            versions[package.replace("-", "_")] = None
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.machine()
    return {"device": device, "commit": commit, "cuda": torch.version.cuda, **versions}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--memory-budget-mib", type=int, default=DEFAULT_MEMORY_BUDGET // 2**20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--commit", default=None, help="is written into every row")
    options = parser.parse_args(arguments)
    fixed = environment(options.commit) | {"warmup": options.warmup, "repeats": options.repeats}
    for tokens in options.tokens:
        for row in bench(tokens, options):
            print(json.dumps(row | fixed), flush=True)


if __name__ == "__main__":
    main()
