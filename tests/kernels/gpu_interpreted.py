"""Compare the Triton kernels, run by Triton's interpreter on CPU tensors, with the reference."""

import conftest
import torch
from slideformer_kernels import adamw_scalars, gpu, reference

same_bits = conftest.assert_same_bits.__wrapped__()
make_state = conftest.make_state.__wrapped__()
make_8bit_edges = conftest.make_8bit_edges.__wrapped__()
make_8bit_state = conftest.make_8bit_state.__wrapped__(make_state)


def compare_updates(numel: int, grad_dtype: torch.dtype) -> None:
    state = make_state(numel, grad_dtype)
    param, grad, exp_avg, exp_avg_sq = state.values()
    scalars = adamw_scalars(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=3)
    split = (*reference.split_master(param), grad, exp_avg, exp_avg_sq)
    for update, operands in (("adamw_split_", split), ("adamw_fp32_", tuple(state.values()))):
        for scale in (0.3712345, torch.tensor([0.3712345])):
            ours, theirs = [x.clone() for x in operands], [x.clone() for x in operands]
            getattr(gpu, update)(*ours, scalars, scale)
            getattr(reference, update)(*theirs, scalars, float(scale))
            for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                same_bits(a, b, f"{update} numel {numel} operand {i}")


def compare_8bit_updates(numel: int, grad_dtype: torch.dtype) -> None:
    state = make_8bit_state(numel, grad_dtype)
    param, *others = state.values()
    split = (*reference.split_master(param), *others)
    for update, operands in (("adamw_split_8bit_", split), ("adamw_fp32_8bit_", tuple(state.values()))):
        for scale in (0.3712345, torch.tensor([0.3712345])):
            ours, theirs = [x.clone() for x in operands], [x.clone() for x in operands]
            for step in (1, 2):
                scalars = adamw_scalars(
                    lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=step
                )
                getattr(gpu, update)(*ours, scalars, scale)
                getattr(reference, update)(*theirs, scalars, float(scale))
                for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                    same_bits(a, b, f"{update} numel {numel} step {step} operand {i}")


def compare_8bit_edges() -> None:
    for ours, scalars in make_8bit_edges():
        theirs = {name: tensor.clone() for name, tensor in ours.items()}
        gpu.adamw_fp32_8bit_(*ours.values(), scalars)
        reference.adamw_fp32_8bit_(*theirs.values(), scalars)
        for name in ours:
            same_bits(ours[name], theirs[name], f"edges of {name}")


def compare_accumulate(numel: int, grad_dtype: torch.dtype) -> None:
    state = make_state(numel, grad_dtype)
    ours, theirs = state["param"].clone(), state["param"].clone()
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
        for numel in (0, 1537):
            compare_updates(numel, dtype)
            compare_accumulate(numel, dtype)
        for numel in (0, 1, 129, 1025, 9001):
            compare_8bit_updates(numel, dtype)
        for numel in (0, 1, 1025, 9001):
            compare_sums(numel, dtype)
    compare_8bit_edges()
    compare_sums(1024 * 1024 + 1, torch.bfloat16)
    print("all bits equal")
