"""Cross-entropy of rows of logits, and its gradient in their place, in plain PyTorch."""

import torch

from .cross_entropy_options import LossOptions

# Rows that are widened to fp32 at a time; their temporaries stay in the cache.
_CHUNK_NUMEL = 1 << 20


@torch.no_grad()
def cross_entropy_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    losses: torch.Tensor,
    options: LossOptions,
    write_grad: bool,
) -> None:
    """Compute each row's loss; turn the logits into its gradient (formula: ``linear_cross_entropy``).

    Args:
        logits: (rows, V) fp32 or bf16, last dimension contiguous; afterwards holds the gradient of the sum of
            the losses, divided by ``options.unit`` and zero in ignored rows, if ``write_grad``.
        labels: (rows,) int64; one outside [0, V) that is not ``ignore_index`` makes its row NaN.
        losses: (rows,) fp32, written; 0 in ignored rows.
        options: ignore index, scaling, soft-capping, label smoothing, z-loss.
        write_grad: whether the gradient is wanted.
    """
    rows = max(1, _CHUNK_NUMEL // logits.shape[1])
    for start in range(0, logits.shape[0], rows):
        part = slice(start, start + rows)
        _cross_entropy(logits[part], labels[part], losses[part], options, write_grad)


def _cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor, options: LossOptions, write_grad: bool
) -> None:
    vocabulary = logits.shape[1]
    smoothing = options.label_smoothing
    x = logits.float() * options.logit_scale
    if options.softcap:
        squashed = torch.tanh(x / options.softcap)
        x = squashed * options.softcap
    ignored = labels == options.ignore_index
    outside = ((labels < 0) | (labels >= vocabulary)) & ~ignored
    target = labels.clamp(0, vocabulary - 1).unsqueeze(1)
    # Large logits lose nothing if the maximum is subtracted first: x - lse would round at the size of lse.
    highest = x.amax(dim=1, keepdim=True)
    log_sum = torch.log(torch.exp(x - highest).sum(dim=1, keepdim=True))
    log_p = x.sub_(highest).sub_(log_sum)
    lse = (highest + log_sum).squeeze(1)
    loss = (smoothing - 1.0) * log_p.gather(1, target).squeeze(1)
    if smoothing:
        loss -= smoothing * log_p.mean(dim=1)
    loss += options.z_loss * lse.square()
    losses.copy_(loss.masked_fill_(outside, torch.nan).masked_fill_(ignored, 0.0))
    if not write_grad:
        return
    p = torch.exp(log_p)
    grad = p - smoothing / vocabulary
    grad.scatter_add_(1, target, torch.full_like(grad[:, :1], smoothing - 1.0))
    if options.z_loss:
        grad += p * (2.0 * options.z_loss * lse).unsqueeze(1)
    if options.softcap:
        grad *= 1.0 - squashed.square()
    grad *= options.logit_scale / options.unit(vocabulary)
    grad.masked_fill_(outside.unsqueeze(1), torch.nan)
    logits.copy_(grad.masked_fill_(ignored.unsqueeze(1), 0.0))


def scaled(grad: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``grad * scale``, computed in fp32, in ``dtype``.

    Args:
        grad: any shape, fp32.
        scale: 0-dim fp32 on the same device.
        dtype: of the result.
    """
    return (grad * scale).to(dtype)
