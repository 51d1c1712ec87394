"""Profile: what a model needs besides its parameters, for one shape of a micro-batch. Pure data.

Bytes are those of an allocator that hands out blocks of 512 bytes. `engine/profiling/trace.py` makes a profile from a
model's own code without running it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class UnitProfile:
    """One run of one unit.

    Attributes:
        boundary_bytes: its inputs that no other unit holds (hidden states). A unit that is recomputed keeps
            them from forward to backward; `offload` moves them to RAM meanwhile.
        saved_bytes: what autograd saves inside beyond the boundary and the weights; `keep` holds it from forward
            to backward, a recompute brings it back for the unit's own backward.
        forward_bytes: the most that is allocated at once in a forward that saves nothing, beyond the boundary; the
            unit's output is part of it.
        backward_bytes: the most that is allocated at once in backward, beyond the boundary and `saved_bytes`:
            gradients of intermediates, of the output and of the input. Gradients of parameters are planned as if all
            were there from the start, and are not in it.
        forward_flops: floating-point operations of the matrix products (attention included) in one forward.
        forward_traffic: bytes that all other operations of a forward read and write.
        recompute_share: part of `forward_flops` that a recompute repeats; it stops when it has collected the last
            saved tensor.
        attention_flops: part of `forward_flops` that one attention kernel does, which is slower at it than a product
            of large matrices; attention of separate products and a softmax is not counted here.
    """

    boundary_bytes: int
    saved_bytes: int
    forward_bytes: int
    backward_bytes: int
    forward_flops: float
    forward_traffic: float
    recompute_share: float
    attention_flops: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """One forward and backward of a model.

    Attributes:
        batch_size: sequences of a micro-batch.
        seq_len: tokens of a sequence.
        units: in forward order, one for each unit of the model.
        held_bytes: allocated outside of units and held from forward to the end of backward: inputs, masks, rotary
            embeddings, what the embedding saves.
        loss_bytes: the most that everything after the last unit (its output, final norm, head, loss) allocates at once
            on top; gradients of parameters outside of units that come with the loss are planned beside it as if all
            were there.
        loss_flops: floating-point operations of the head's three products.
        loss_traffic: bytes that the rest of the loss reads and writes.
        source: "traced", or "estimated" where the model's code could not be traced.
        notes: what a user should know of these figures.
    """

    batch_size: int
    seq_len: int
    units: tuple[UnitProfile, ...]
    held_bytes: int
    loss_bytes: int
    loss_flops: float
    loss_traffic: float
    source: str = "traced"
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.batch_size * self.seq_len
