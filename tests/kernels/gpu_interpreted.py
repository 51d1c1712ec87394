"""Compare the Triton kernels, run by Triton's interpreter on CPU tensors, with the reference."""

import conftest
import torch
from slideformer_kernels import gpu, reference
from update_cases import BY_NAME, CASES, Case, clone

same_bits = conftest.assert_same_bits.__wrapped__()
make_state = conftest.make_state.__wrapped__()
make_8bit_edges = conftest.make_8bit_edges.__wrapped__()
make_8bit_state = conftest.make_8bit_state.__wrapped__(make_state)
start_of = conftest.start_of.__wrapped__(make_state, make_8bit_state)


def compare_updates(case: Case, numel: int, grad_dtype: torch.dtype) -> None:
    start = start_of(case, numel, grad_dtype)
    for scale in (0.3712345, torch.tensor([0.3712345])):
        ours, theirs = clone(start), clone(start)
        for step in (1, 2):
            scalars = case.scalars(step, 0.1)
            case.apply(gpu, ours, scalars, scale)
            case.apply(reference, theirs, scalars, float(scale))
            for name in ours:
                same_bits(ours[name], theirs[name], f"{case} numel {numel} step {step} {name}")


def compare_8bit_edges() -> None:
    case = BY_NAME["adamw_8bit-fp32"]
    for ours, scalars in make_8bit_edges():
        theirs = clone(ours)
        case.apply(gpu, ours, scalars)
        case.apply(reference, theirs, scalars)
        for name in ours:
            same_bits(ours[name], theirs[name], f"edges of {name}")


def compare_accumulate(numel: int, grad_dtype: torch.dtype) -> None:
    state = make_state(numel, grad_dtype)
    ours, theirs = state["weight"].clone(), state["weight"].clone()
    gpu.accumulate_(ours, state["grad"])
    reference.accumulate_(theirs, state["grad"])
    same_bits(ours, theirs, f"accumulate_ numel {numel}")


def compare_sums(numel: int, dtype: torch.dtype) -> None:
    for gentle in (True, False):
        x = make_state(numel, dtype, gentle=gentle)["grad"]
        expected = torch.tensor(reference.sum_of_squares(x), dtype=torch.float64)
        same_bits(gpu.sum_of_squares(x), expected, f"sum_of_squares numel {numel}")


if __name__ == "__main__":
    conftest.patch_language_once()
    for dtype in (torch.bfloat16, torch.float32):
        for case in CASES:
            for numel in (0, 1, 129, 1025, 9001) if case.is_8bit else (0, 1537):
                compare_updates(case, numel, dtype)
        for numel in (0, 1537):
            compare_accumulate(numel, dtype)
        for numel in (0, 1, 1025, 9001):
            compare_sums(numel, dtype)
    compare_8bit_edges()
    compare_sums(1024 * 1024 + 1, torch.bfloat16)
    print("all bits equal")
