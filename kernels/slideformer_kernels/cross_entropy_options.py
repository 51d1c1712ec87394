"""What the loss of rows of logits is made of, as both implementations of it take it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LossOptions:
    """What happens between logits and loss; see :func:`~slideformer_kernels.cross_entropy.linear_cross_entropy`."""

    ignore_index: int = -100
    logit_scale: float = 1.0
    softcap: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def unit(self, vocabulary: int) -> float:
        """What the row kernels' gradients are divided by, for backward to multiply by in fp32.

        It makes a label's entry -1 plus its probability, and -1 is a number that bf16 holds, unlike, say, -0.9, which
        it rounds by 0.2 %: that entry is the largest of its row, and its rounding would be most of the error.
        """
        return (1.0 - self.label_smoothing + self.label_smoothing / vocabulary) * self.logit_scale or 1.0
