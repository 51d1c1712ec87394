"""Tensors with a gradient that reach a layer past its arguments, or leave it past its outputs.

A layer's own graph is differentiated alone, towards its arguments and its parameters. What the layer takes from
somewhere else (an attribute that the model sets before the call, an object among the arguments that nobody can look
into) would get no gradient, without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.autograd.graph import GradientEdge

from ...errors import StateError, UnsupportedModelError


def check_no_leaks(
    name: str, edges: Iterable[GradientEdge | None], leaves: Sequence[torch.Tensor], *, since: int
) -> None:
    """Walk a layer's graph, and refuse a layer whose graph does not end in `leaves`.

    Args:
        name: of the layer.
        edges: where its graph ends, of each output with a gradient.
        leaves: arguments and parameters, all that may be differentiated.
        since: autograd's sequence number when the layer began: what is older belongs to somebody else's graph.

    Raises:
        UnsupportedModelError: the graph reaches another tensor.
    """
    known = {id(leaf) for leaf in leaves}
    until = torch._C._autograd._get_sequence_nr()
    waiting = [edge.node for edge in edges if edge is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if type(node).__name__ == "AccumulateGrad":
            own = id(node.variable) in known  # type: ignore[attr-defined]
        else:
            own = since <= node._sequence_nr() < until
        if not own:
            raise UnsupportedModelError(
                f"{name} uses a tensor with a gradient ({_described(node)}) that is neither one of its arguments nor "
                "one of its parameters, so that its gradient would be lost; hand it to the layer as an argument, by "
                "itself or in a tuple, list or dict, or detach it, or use plain Trainer for this model"
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def guard_leaf(leaf: torch.Tensor) -> None:
    """Have a stand-in for a layer's input or weight refuse to be filled with a gradient (once).

    A layer is differentiated towards such leaves, which fills no gradient of theirs. Only a graph outside does that.
    """
    if leaf.requires_grad and not leaf._post_accumulate_grad_hooks:
        leaf.register_post_accumulate_grad_hook(_refuse_gradient)


def _refuse_gradient(leaf: torch.Tensor) -> None:
    leaf.grad = None
    raise StateError(
        f"a weight or an input of a streamed layer (shape {tuple(leaf.shape)}) was taken out of the layer, by a hook "
        "inside it perhaps, and used in the loss; its gradient would be lost. Use the model's own parameter or the "
        "layer's input before the layer, detach what is taken out, or use plain Trainer"
    )


def _described(node: torch.autograd.graph.Node) -> str:
    variable = getattr(node, "variable", None)
    if isinstance(variable, torch.Tensor):
        return f"a leaf of shape {tuple(variable.shape)}"
    return f"made by {node.name()}"
