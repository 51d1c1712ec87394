"""A model without data: runs the real model's code on tensors that have only shapes, as a GPU would run it.

`fake_copy` makes a copy of a model over `FakeTensorMode` tensors; the model itself is never touched. The copies say
that they are on the CPU, so that any machine can run them. `on_fake_tensors` makes code that cannot run on such tensors
run, and, for a GPU, has attention, softmax and autocast choose the operators that they choose on CUDA: what these save
and allocate differs from the CPU's.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from slideformer_kernels.cross_entropy import logits_chunk_shape
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from ..run import deferred_logits as loss
from .allocations import AllocationTracker

aten = torch.ops.aten


# -- the copy ------------------------------------------------------------------------------------------------------


def fake_copy(model: nn.Module, fakes: FakeTensorMode, dtypes: Mapping[int, torch.dtype]) -> nn.Module:
    """A copy of `model`, in training mode, whose tensors have no data and say that they are on the CPU.

    The copy does not checkpoint gradients, and uses torch's attention where the model uses flash-attn's.

    Args:
        model: on any device, "meta" included; not changed.
        fakes: the mode that the copy's tensors belong to.
        dtypes: by `id(parameter)`: its dtype in the copy, where that is another one.
    """
    memo: dict[int, Any] = {}
    for param in model.parameters():
        memo[id(param)] = nn.Parameter(
            _like(param, fakes, dtypes.get(id(param), param.dtype)), requires_grad=param.requires_grad
        )
    for buffer in model.buffers():
        memo.setdefault(id(buffer), _like(buffer, fakes, buffer.dtype))
    with _CopiesAsFakes(fakes):
        copied: nn.Module = copy.deepcopy(model, memo)
    for module in copied.modules():
        config: Any = getattr(module, "config", None)
        # Kernels that torch knows nothing of; torch's own save the same.
        if "flash" in str(getattr(config, "_attn_implementation", "")):
            config._attn_implementation = "sdpa"
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False  # type: ignore[assignment]
    return copied.train()


@contextlib.contextmanager
def liger_applied(model: nn.Module, config: Mapping[str, Any] | None) -> Iterator[None]:
    """Liger Kernel's layers in a copied model, and nowhere else once this ends; None applies nothing.

    Liger replaces functions of the model's modules in Python too, which every other model of that family would see.
    """
    if config is None:
        yield
        return
    from transformers.integrations.liger import apply_liger_kernel

    classes = {
        type(module) for module in model.modules() if type(module).__module__.startswith("transformers")
    }
    modules = {cls.__module__: sys.modules[cls.__module__] for cls in classes}
    before = [(scope, dict(vars(scope))) for scope in (*modules.values(), *classes)]
    try:
        apply_liger_kernel(model, dict(config))
        yield
    finally:
        for scope, names in before:
            for name, value in names.items():
                if vars(scope).get(name) is not value:
                    setattr(scope, name, value)


def _like(tensor: torch.Tensor, fakes: FakeTensorMode, dtype: torch.dtype) -> torch.Tensor:
    with fakes, torch.no_grad():
        if tensor.layout != torch.strided:
            raise NotImplementedError(f"a tensor with layout {tensor.layout}")
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="cpu")


class _CopiesAsFakes(TorchFunctionMode):
    """`copy.deepcopy` of a tensor that is no parameter or buffer gives a fake one."""

    def __init__(self, fakes: FakeTensorMode) -> None:
        super().__init__()
        self._fakes = fakes

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = _like(tensor, self._fakes, tensor.dtype).requires_grad_(
                    tensor.requires_grad
                )
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


# -- what cannot run on fake tensors -------------------------------------------------------------------------------


@contextlib.contextmanager
def on_fake_tensors(tracker: AllocationTracker, *, cuda: bool) -> Iterator[TorchFunctionMode]:
    """Context in which a model runs on fake tensors as it would on real ones.

    For its duration some functions of Triton, transformers and this package are replaced by ones that look for fake
    tensors among their arguments, and are the originals where there are none. Random generators are left as they
    were.

    Args:
        tracker: receives the work of kernels that are not launched.
        cuda: run what a GPU would.

    Yields:
        The function mode that is active; functions that torch hides from it (autograd's backward) may enter it again.
    """

    def no_launch(original: Callable, self: Any, *args: Any, **kwargs: Any) -> None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, FakeTensor)]
        tracker.count_work(traffic=sum(x.nbytes for x in tensors))

    def no_packing(original: Callable, *args: Any, **kwargs: Any) -> None:
        """Each row is one sequence; to find that out, the original reads the positions."""

    def is_inside(original: Callable, *args: Any, **kwargs: Any) -> bool:
        """No label is outside of the vocabulary."""
        return False

    def unequal(original: Callable, *args: Any, **kwargs: Any) -> bool:
        """Values that nobody knows (Liger's fused loss asks whether its gradient is one)."""
        return False

    def fused_loss(
        original: Callable, hidden, weight, labels, bias=None, *, reduction="mean", **options: Any
    ):
        losses = _FusedLoss.apply(hidden.reshape(-1, hidden.shape[-1]), weight, bias, tracker)
        return losses if reduction == "sum" else losses / labels.numel()

    replacements: list[tuple[Any, str, Callable]] = [
        *((owner, "run", no_launch) for owner in _triton_launchers()),
        (importlib.import_module("transformers.masking_utils"), "find_packed_sequence_indices", no_packing),
        (loss, "_is_outside", is_inside),
        (torch, "equal", unequal),
    ]
    if cuda:
        replacements.append((loss, "linear_cross_entropy", fused_loss))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_same_generators())
        stack.enter_context(_without_stack_traces())
        for owner, name, replacement in replacements:
            if hasattr(owner, name):
                stack.enter_context(_replaced_for_fakes(owner, name, replacement))
        stack.enter_context(torch.device("cpu"))
        mode = _Ambient(cuda=cuda)
        stack.enter_context(mode)
        yield mode


def _triton_launchers() -> list[type]:
    try:
        from triton.runtime import autotuner, interpreter, jit
    except ImportError:
        return []
    return [jit.JITFunction, autotuner.Autotuner, interpreter.InterpretedFunction]


@contextlib.contextmanager
def _replaced_for_fakes(owner: Any, name: str, replacement: Callable) -> Iterator[None]:
    """`owner.name` is `replacement(original, ...)` for calls with a fake tensor among their arguments."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, FakeTensor) for x in pytree.tree_leaves((args, kwargs))):
            return replacement(original, *args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def _without_stack_traces() -> Iterator[None]:
    """Nothing is logged of an operator that knows no shapes: who asked gets its error too, and estimates instead."""

    def refuse(record: logging.LogRecord) -> bool:
        return False

    log = logging.getLogger(FakeTensor.__module__)
    log.addFilter(refuse)
    try:
        yield
    finally:
        log.removeFilter(refuse)


@contextlib.contextmanager
def _same_generators() -> Iterator[None]:
    state = torch.get_rng_state()
    device_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if device_states is not None:
            torch.cuda.set_rng_state_all(device_states)


class _FusedLoss(torch.autograd.Function):
    """Allocates what `linear_cross_entropy` does on a GPU."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, tracker):
        operands = (hidden, weight, bias)
        (rows, width), vocabulary = hidden.shape, weight.shape[0]
        ctx.dtypes = [None if x is None else x.dtype for x in operands]
        ctx.grads = [
            torch.empty(x.shape, dtype=torch.float32) if x is not None and wanted else None
            for x, wanted in zip(operands, ctx.needs_input_grad, strict=False)
        ]
        losses = torch.empty(rows, dtype=torch.float32)
        logits = torch.empty(logits_chunk_shape(rows, vocabulary, hidden.element_size()), dtype=hidden.dtype)
        del logits
        products = 1 + sum(grad is not None for grad in ctx.grads[:2])
        tracker.count_work(
            flops=2.0 * products * rows * vocabulary * width,
            # Its kernel reads the logits twice and writes their gradient.
            traffic=3.0 * rows * vocabulary * hidden.element_size(),
        )
        return losses.sum()

    @staticmethod
    def backward(ctx, grad_total):
        results = []
        for index, dtype in enumerate(ctx.dtypes):
            grad, ctx.grads[index] = ctx.grads[index], None
            results.append(grad if grad is None or dtype == torch.float32 else grad.to(dtype))
        return *results, None


# -- what a GPU would do -------------------------------------------------------------------------------------------

# Functions that autocast runs in fp32 on CUDA but not on the CPU (at/autocast_mode.h, AT_FORALL_FP32).
_FP32_ON_CUDA = frozenset(
    (
        "layer_norm",
        "group_norm",
        "pow",
        "__pow__",
        "__rpow__",
        "rsqrt",
        "reciprocal",
        "exp",
        "expm1",
        "log",
        "log10",
        "log2",
        "log1p",
        "softplus",
        "acos",
        "asin",
        "cosh",
        "sinh",
        "tan",
        "erfinv",
        "renorm",
        "dist",
        "cdist",
        "pdist",
        "logsumexp",
        "norm",
        "cosine_similarity",
        "cross_entropy",
        "nll_loss",
        "kl_div",
        "l1_loss",
        "mse_loss",
        "smooth_l1_loss",
        "huber_loss",
        "binary_cross_entropy_with_logits",
    )
)
# And those whose result is fp32 while they read the operand as it is (AT_FORALL_FP32_SET_OPT_DTYPE).
_FP32_RESULT_ON_CUDA = frozenset(("softmax", "log_softmax", "sum", "prod", "cumsum", "cumprod"))
_HALF = (torch.bfloat16, torch.float16)


class _Ambient(TorchFunctionMode):
    """Answers what fake tensors cannot and, for a GPU, chooses CUDA's operators."""

    def __init__(self, *, cuda: bool) -> None:
        super().__init__()
        self._cuda = cuda
        # By sum of a mask: what it is at most.
        self._most_true = WeakIdKeyDictionary()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.rand and pytree.tree_leaves(args) == [] and not kwargs.get("size"):
            return torch.tensor(1.0)  # layers dropped at random: none is
        if func is torch.Tensor.item and args[0] in self._most_true:
            return self._most_true[args[0]]
        if func is torch.bincount and kwargs.get("minlength"):  # experts by their number: none is beyond
            return torch.empty(kwargs["minlength"], dtype=torch.int64)
        if (
            func is getattr(torch, "_grouped_mm", None)
            and "offs" in kwargs
            and args[0].dtype != torch.bfloat16
        ):
            # Its kernels take fp32 too, but torch knows shapes in bf16 only; transformers' own operator has the same.
            func, args, kwargs = (
                torch.ops.transformers.grouped_mm_fallback,
                args[:2],
                {"offs": kwargs["offs"]},
            )
        if self._cuda:
            func, args, kwargs = _as_on_cuda(func, args, kwargs)
        result = func(*args, **kwargs)
        if func is torch.Tensor.sum and args[0].dtype == torch.bool and isinstance(result, FakeTensor):
            self._most_true[result] = args[0].numel()  # labels that count: all
        return result


def _as_on_cuda(func: Callable, args: tuple, kwargs: dict) -> tuple[Callable, tuple, dict]:
    """The call that makes a CPU tensor go the way of a CUDA tensor."""
    if func is nn.functional.scaled_dot_product_attention:
        return _attention_on_cuda, args, kwargs
    name = getattr(func, "__name__", "")
    if torch.is_autocast_enabled("cpu"):
        if name in _FP32_ON_CUDA:
            args, kwargs = pytree.tree_map(_widened, (args, kwargs))
        elif name in _FP32_RESULT_ON_CUDA and _is_half(args[0]) and kwargs.get("dtype") is None:
            kwargs = {**kwargs, "dtype": torch.float32}
    if name in ("softmax", "log_softmax") and kwargs.get("dtype") == torch.float32 and _is_half(args[0]):
        # One kernel on CUDA; on the CPU a cast comes first.
        dim = kwargs["dim"] if "dim" in kwargs else args[1]
        return (aten._softmax if name == "softmax" else aten._log_softmax), (args[0], dim, True), {}
    return func, args, kwargs


def _is_half(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype in _HALF


def _widened(x: Any) -> Any:
    return x.float() if _is_half(x) else x


def _attention_on_cuda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` by the kernel that CUDA chooses (aten/native/transformers/cuda/sdp_utils.cpp)."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (x.to(dtype) for x in (query, key, value))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    same_heads = query.shape[-3] == key.shape[-3]
    is_regular = query.dim() == 4 and query.shape[-1] % 8 == 0
    if is_regular and _is_half(query) and attn_mask is None and query.shape[-1] == value.shape[-1] <= 256:
        return aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
    if is_regular and same_heads:
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.empty(attn_mask.shape, dtype=query.dtype)
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        wants_grads = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, wants_grads, dropout_p, is_causal, scale=scale
        )[0]
    return aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def cuda_workspace_bytes(func: Any, args: tuple) -> int:
    """Bytes that CUDA's attention kernels allocate inside in backward and free again.

    From PyTorch's sources: flash_attn/flash_api.cpp (`dq_accum`, `softmax_d`, and the gradients of keys and values for
    each query head), attention_backward.cu (`workspace`, `delta`). cuDNN's attention, which torch >= 2.11 prefers to
    flash attention on Hopper, took one copy of the queries more than that with grouped queries (peaks of
    docs/benchmarks/2026-11-22-h100-kernels, batch 8, 16 and 32); that much is counted always.
    """
    packet = getattr(func, "_overloadpacket", None)
    if packet is aten._scaled_dot_product_flash_attention_backward:
        query, key = args[1], args[2]
        batch, heads, length, width = query.shape
        rows = -(-length // 128) * 128
        sums = 4 * batch * heads * rows * (-(-width // 32) * 32 + 1)
        per_head = 2 * key[:, :1].numel() * heads * key.element_size() if heads != key.shape[1] else 0
        return sums + per_head + query.numel() * query.element_size()
    if packet is aten._scaled_dot_product_efficient_attention_backward:
        query, key, value = args[1:4]
        sums = query.numel() + key.numel() + value.numel() if query.dtype != torch.float32 else 0
        return 4 * (sums + query[..., 0].numel())
    return 0
