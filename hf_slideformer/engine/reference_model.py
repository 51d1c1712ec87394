"""A reference model that follows the trained one: `sync_ref_model` of TRL's DPOTrainer (TR-DPO, arXiv 2404.09656)."""

from __future__ import annotations

from .engine import SlideEngine


def follow(reference: SlideEngine, trained: SlideEngine, share: float) -> None:
    """Move the weights of `reference` towards those of `trained`, wherever the two live.

    Args:
        reference: weights become `(1 - share) * own + share * trained`, in the dtype that they came in.
        trained: a model of the same parameters in the same order; not changed.
        share: between 0 and 1.
    """
    trained.synchronize()
    reference.pool.wait()
    leaders = {state.order: (state, states) for states in trained.states_by_unit() for state in states}
    for states in reference.states_by_unit():
        # A unit's parameters are in one unit there too, or on the device.
        unit = leaders[states[0].order][1] if states else []
        with reference.state_in_memory(states, write=True), trained.state_in_memory(unit):
            for state in states:
                value = state.read_master()
                target = leaders[state.order][0].read_master().to(value.device)
                state.write_master(value.mul(1.0 - share).add_(target, alpha=share))
    reference.state_loaded()
