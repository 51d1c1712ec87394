"""The bf16 training that `SlideTrainer` must reproduce bit for bit, as a plain PyTorch loop.

bf16 weights lie in the model; the fp32 masters are kept outside, split into those bf16 weights and an int16
residual. One step: every micro-batch forward under autocast and backward; gradients stay as autograd gives them
(bf16) if there is one micro-batch and are summed in fp32 otherwise; one global norm; one clip coefficient; AdamW on
the masters, parameter by parameter, with fp32 or 8-bit moments. Nothing is streamed, overlapped, grouped or fused,
and the update is `slideformer_kernels.reference`, which states what every kernel must compute.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from slideformer_kernels import reference
from slideformer_kernels.rules import ADAMW
from slideformer_kernels.scalars import adamw_scalars
from transformers import PreTrainedModel

BETAS = (0.9, 0.999)
EPSILON = 1e-8
MOMENT_FORMATS = {"fp32": "adamw", "8bit": "adamw_8bit"}

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ReferenceResult:
    """What the loop produced.

    Attributes:
        losses: one float per optimizer step, summed over its micro-batches in fp32 as Trainer logs it.
        grad_norms: the gradients' global norm before clipping, one float64 per step.
        weights: name -> bf16 weights after training (each tied parameter once).
        residuals: name -> int16 low halves of the masters.
        masters: name -> fp32 masters.
    """

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, torch.Tensor]
    residuals: dict[str, torch.Tensor]
    masters: dict[str, torch.Tensor]


def clip_coefficient(norm: float, max_grad_norm: float) -> float:
    """Return what gradients of global norm ``norm`` are multiplied by, rounded to fp32; 0 switches clipping off."""
    if max_grad_norm == 0.0:
        return 1.0
    coefficient = max_grad_norm / (norm + 1e-6)
    # Not min(): a NaN must stay one, and which of its arguments min() returns depends on their order.
    return 1.0 if coefficient > 1.0 else torch.tensor(coefficient, dtype=torch.float32).item()


def train(
    model: PreTrainedModel,
    steps: Sequence[Sequence[Batch]],
    learning_rates: Sequence[float],
    *,
    max_grad_norm: float,
    weight_decay: float,
    keep_residual: bool = True,
    optimizer_states: str = "fp32",
) -> ReferenceResult:
    """Train ``model`` in place.

    Args:
        model: a causal language model in fp32 or bf16, on the CPU; its parameters become bf16, frozen ones too.
        steps: per optimizer step its micro-batches.
        learning_rates: per optimizer step the learning rate.
        max_grad_norm: clip to this norm; 0 does not clip.
        weight_decay: for matrices; vectors (norms and biases) are not decayed. For the llama-shaped families
            that is how Trainer groups them.
        keep_residual: False drops the low halves after every update, to show what they are for.
        optimizer_states: "fp32" or "8bit" moments.
    """
    model.train()
    model.config.use_cache = False
    # Registration order, each tied parameter once.
    parameters = {name: param for name, param in model.named_parameters() if param.requires_grad}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data, _ = reference.split_master(parameter.detach().float())
    residuals, moments = {}, {}
    for name, parameter in parameters.items():
        hi, residuals[name] = reference.split_master(parameter.detach().float())
        parameter.data = hi
        zeros = torch.zeros_like(hi, dtype=torch.float32), torch.zeros_like(hi, dtype=torch.float32)
        tensors = zeros if optimizer_states == "fp32" else reference.quantize_moments(*zeros)
        moments[name] = dict(zip(ADAMW.formats[MOMENT_FORMATS[optimizer_states]], tensors, strict=True))

    losses, grad_norms = [], []
    for number, (micro_batches, learning_rate) in enumerate(zip(steps, learning_rates, strict=True), start=1):
        loss, gradients = _loss_and_gradients(model, parameters, micro_batches)
        losses.append(loss)
        total = 0.0
        for gradient in gradients.values():
            total += reference.sum_of_squares(gradient)
        grad_norms.append(math.sqrt(total))
        coefficient = clip_coefficient(grad_norms[-1], max_grad_norm)
        for name, parameter in parameters.items():
            scalars = adamw_scalars(
                lr=learning_rate,
                beta1=BETAS[0],
                beta2=BETAS[1],
                eps=EPSILON,
                weight_decay=0.0 if parameter.dim() == 1 else weight_decay,
                step=number,
            )
            masters = (parameter.data, residuals[name])
            reference.adamw_(masters, gradients[name], moments[name], scalars, coefficient)
            if not keep_residual:
                residuals[name].zero_()

    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    masters = {name: reference.join_master(weights[name], residuals[name]) for name in parameters}
    return ReferenceResult(losses, grad_norms, weights, residuals, masters)


def _loss_and_gradients(
    model: PreTrainedModel, parameters: dict[str, torch.nn.Parameter], micro_batches: Sequence[Batch]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Run one step's micro-batches; return the loss that Trainer logs and each parameter's gradient."""
    # A loss is the sum over label tokens divided by their number in the whole step; the first position of a row
    # predicts nothing.
    label_count = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro_batches)
    total_loss = torch.tensor(0.0)
    if len(micro_batches) > 1:
        # Gradients are summed in fp32, also where a tied weight gets several in one backward.
        for parameter in parameters.values():
            parameter.grad_dtype = torch.float32
    for batch in micro_batches:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch, num_items_in_batch=label_count).loss
        loss.backward()
        total_loss += loss.detach()
    gradients = {}
    for name, parameter in parameters.items():
        gradients[name], parameter.grad = parameter.grad, None
        assert gradients[name].dtype == (torch.bfloat16 if len(micro_batches) == 1 else torch.float32)
    return total_loss.item(), gradients
