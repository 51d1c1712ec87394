"""What the cross-entropy tests compare with: a float64 truth, plain PyTorch, and the rule for their errors.

The rule: the error against the truth has a root mean square at most 1.1 times, and a maximum at most twice, that
of plain PyTorch in the same dtype. Errors are pooled over seeds, since one seed's maximum is mostly luck.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

RMS_FACTOR, MAX_FACTOR = 1.1, 2.0
# The root mean square of so few numbers, such as losses, is as much luck as their maximum.
FEW = 30
# A bf16 gradient of the bias that comes from a single row has been rounded once by plain PyTorch: it rounds the
# scaled gradient of the logits. Ours rounds before and after scaling, as forward does not know the scale.
BF16_BIAS_FACTOR = math.sqrt(2.0)
# Where plain PyTorch is nearly exact (one row, one vocabulary entry, a loss that is one number), an error of four times
# fp32's precision is as good: by so much fp32 sums of thousands of products differ with the way in which the matrix
# library splits them. It is relative to the values' own root mean square or maximum.
FLOOR = 4 * 2.0**-23
# The truth for a large vocabulary would fill a GPU if its logits were kept for all rows.
TRUTH_ROWS = 512

OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum", "ignore_index": -1},
    "scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 3.0},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    # Its ignore_index could be a real label.
    "all": {
        "reduction": "sum",
        "ignore_index": 2,
        "logit_scale": 1.7,
        "softcap": 5.0,
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
    },
}


def truth_rows(logits: torch.Tensor, labels: torch.Tensor, **options) -> torch.Tensor:
    """Return each row's loss by the documented formula; 0 where the label is ignored."""
    smoothing, softcap = options.get("label_smoothing", 0.0), options.get("softcap")
    x = options.get("logit_scale", 1.0) * logits
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    kept = labels != options.get("ignore_index", -100)
    lse = torch.logsumexp(x, dim=1)
    x_label = x.gather(1, labels.where(kept, 0).unsqueeze(1)).squeeze(1)
    rows = (1 - smoothing) * (lse - x_label) + options.get("z_loss", 0.0) * lse**2
    if smoothing:
        rows = rows + smoothing * (lse - x.mean(dim=1))
    return rows.where(kept, 0.0)


def plain_rows(logits: torch.Tensor, labels: torch.Tensor, **options) -> torch.Tensor:
    """Return the same as models and trainers compute it: in fp32 from the linear layer's logits."""
    softcap, ignore_index = options.get("softcap"), options.get("ignore_index", -100)
    x = logits.float() * options.get("logit_scale", 1.0)
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    smoothing = options.get("label_smoothing", 0.0)
    rows = F.cross_entropy(x, labels, ignore_index=ignore_index, reduction="none", label_smoothing=smoothing)
    z_loss = options.get("z_loss", 0.0)
    if z_loss:
        rows = rows + z_loss * torch.logsumexp(x, dim=1).square().where(labels != ignore_index, 0.0)
    return rows


def truth(hidden, weight, labels, bias=None, *, reduction: str = "mean", **options) -> torch.Tensor:
    """Evaluate ``linear_cross_entropy``, exactly if the operands are float64."""

    def part_sum(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return truth_rows(F.linear(hidden, weight, bias), labels, **options).sum()

    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    parts = zip(hidden.split(TRUTH_ROWS), labels.split(TRUTH_ROWS), strict=True)
    total = sum(checkpoint(part_sum, *part, use_reentrant=False, preserve_rng_state=False) for part in parts)
    return total if reduction == "sum" else total / count_kept(labels, options)


def plain(hidden, weight, labels, bias=None, *, reduction: str = "mean", **options) -> torch.Tensor:
    """Evaluate ``linear_cross_entropy`` in plain PyTorch."""
    labels = labels.reshape(-1)
    logits = F.linear(hidden.reshape(-1, hidden.shape[-1]), weight, bias)
    total = plain_rows(logits, labels, **options).sum()
    return total if reduction == "sum" else total / count_kept(labels, options)


def count_kept(labels: torch.Tensor, options: dict) -> torch.Tensor:
    return (labels != options.get("ignore_index", -100)).sum()


def make_operands(
    rows: int, vocabulary: int, width: int, dtype: torch.dtype, *, seed: int = 0, device: str = "cpu"
) -> list[torch.Tensor]:
    """Make hidden (rows, width), weight (vocabulary, width), labels (rows,) and bias (vocabulary,).

    Logits have a standard deviation of about 2. The first and the last entry of the vocabulary are labels.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    hidden = normal(rows, width)
    weight = normal(vocabulary, width) * (2 / math.sqrt(width))
    bias = normal(vocabulary)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator, device=device)
    labels[:1] = vocabulary - 1
    labels[1:2] = 0
    return [hidden.to(dtype), weight.to(dtype), labels, bias.to(dtype)]


def ignore_some(labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Ignore every third row, from the third on."""
    labels = labels.clone()
    labels[2::3] = ignore_index
    return labels


def evaluate(
    function: Callable, operands: list, upstream: float = 1.0, dtype: torch.dtype | None = None, **options
) -> dict[str, torch.Tensor]:
    """Return the loss and the gradients of ``upstream * loss`` by name, in float64; computed in ``dtype``."""
    hidden, weight, labels, bias = operands
    leaves = {
        name: x.detach().to(dtype or x.dtype).requires_grad_()
        for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias))
        if x is not None
    }
    loss = function(leaves["hidden"], leaves["weight"], labels, leaves.get("bias"), **options)
    (loss * upstream).backward()
    for name, x in leaves.items():
        assert x.grad.dtype == x.dtype and x.grad.shape == x.shape, name
    return {"loss": loss.detach().double()} | {name: x.grad.double() for name, x in leaves.items()}


class Errors:
    """Errors of ours and of the plain implementation against the truth, pooled, by name."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._is_bf16 = dtype == torch.bfloat16
        self._pools: dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}

    def add(self, ours: dict, plain: dict, truth: dict) -> None:
        assert ours.keys() == plain.keys() == truth.keys()
        for name, exact in truth.items():
            assert torch.isfinite(exact).all(), f"the true {name} is not finite"
            assert torch.isfinite(ours[name]).all(), f"{name} is not finite"
            pooled = (ours[name] - exact, plain[name] - exact, exact)
            self._pools.setdefault(name, []).append(tuple(x.flatten() for x in pooled))

    def check(self, what: str) -> None:
        """Raise AssertionError, with all that was measured, if the rule is broken."""
        lines, is_broken = [], False
        for name, pools in self._pools.items():
            ours, plain, exact = (torch.cat(x) for x in zip(*pools, strict=True))
            if exact.numel() == 0:
                continue
            extra = BF16_BIAS_FACTOR if self._is_bf16 and name == "bias" else 1.0
            rms_factor = MAX_FACTOR if exact.numel() < FEW else RMS_FACTOR
            for kind, factor, norm in (("rms", extra * rms_factor, _rms), ("max", extra * MAX_FACTOR, _max)):
                error, plain_error, floor = norm(ours), norm(plain), FLOOR * norm(exact)
                breaks = error > max(factor * plain_error, floor)
                is_broken |= breaks
                ratio = error / plain_error if plain_error else math.inf if error else 0.0
                lines.append(
                    f"{'BROKEN ' if breaks else ''}{name} {kind}: error {error:.3g} is {ratio:.3f} of plain "
                    f"PyTorch's (allowed {factor:.2f}, or error {floor:.3g})"
                )
        assert not is_broken, "\n".join([what, *lines])


def _rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def _max(x: torch.Tensor) -> float:
    return x.abs().max().item()


def within_octave(value: float, seed: int) -> float:
    """Return ``value`` times a number in [1, 2) that differs from seed to seed.

    The gradients of the logits at the labels are nearly all the same number. How far bf16 rounds it is luck, so one
    scale alone would compare lucks: the plain implementation rounds it with all scales, ours without.
    """
    return value * 2.0 ** (seed * 0.618034 % 1.0)


def measure(
    function: Callable,
    rows: int,
    vocabulary: int,
    width: int,
    dtype: torch.dtype,
    options: dict,
    *,
    seeds: int,
    has_bias: bool = True,
    gain: float = 1.0,
    device: str = "cpu",
    **ours_only,
) -> Errors:
    """Compare ``function`` and plain PyTorch with the truth; ``gain`` multiplies the hidden states."""
    errors = Errors(dtype)
    for seed in range(seeds):
        hidden, weight, labels, bias = make_operands(rows, vocabulary, width, dtype, seed=seed, device=device)
        labels = ignore_some(labels, options.get("ignore_index", -100))
        operands = [hidden * gain, weight, labels, bias if has_bias else None]
        used = dict(options)
        if "logit_scale" in used:
            used["logit_scale"] = within_octave(used["logit_scale"], 3 * seed + 1)
        upstream = within_octave(0.37, seed)
        errors.add(
            evaluate(function, operands, upstream, **used, **ours_only),
            evaluate(plain, operands, upstream, **used),
            evaluate(truth, operands, upstream, torch.float64, **used),
        )
    return errors
