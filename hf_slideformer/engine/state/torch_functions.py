"""What operations of torch do with a parameter: which look at no data, which give views, which write.

Sets of what `__torch_function__` is called with. Whatever is in none of them reads, and may write.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

# Attributes of tensors whose values are data.
_OF_DATA = ("data", "T", "mT", "H", "mH", "real", "imag")

_METADATA_METHODS = """
    size stride dim ndimension numel nelement element_size storage_offset data_ptr untyped_storage storage
    _typed_storage is_contiguous get_device is_floating_point is_complex is_signed is_pinned is_shared is_same_size
    is_set_to is_conj is_neg is_inference has_names dense_dim sparse_dim dim_order _is_view register_hook
    register_post_accumulate_grad_hook retain_grad requires_grad_ detach_ share_memory_ set_ resize_ resize_as_ rename_
    t_ transpose_ squeeze_ unsqueeze_ swapaxes_ swapdims_ as_strided_ __len__ __hash__ __dir__
"""
_METADATA_FUNCTIONS = """
    numel is_floating_point is_complex is_signed is_conj is_neg is_inference is_same_size get_device is_storage
    _has_compatible_shallow_copy_type
"""
_VIEWS = """
    detach view view_as reshape reshape_as transpose t permute squeeze unsqueeze flatten unflatten narrow select
    __getitem__ chunk split split_with_sizes tensor_split hsplit vsplit dsplit unbind expand expand_as broadcast_to
    diagonal as_strided movedim moveaxis swapaxes swapdims ravel unfold adjoint unsafe_chunk unsafe_split
"""
_LIKE = """
    zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_empty new_full
    new_empty_strided new_tensor
"""
_COMPUTE = """
    matmul __matmul__ __rmatmul__ mm bmm mv addmm addbmm baddbmm addmv einsum tensordot inner dot conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d linear bilinear embedding embedding_bag layer_norm rms_norm
    group_norm batch_norm instance_norm scaled_dot_product_attention
"""
_IN_PLACE = "iadd isub imul imatmul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift setitem"


def _named(names: str) -> frozenset[Any]:
    places = (torch.Tensor, torch, nn.functional, torch._C._nn)
    found = [getattr(place, name, None) for name in names.split() for place in places]
    return frozenset(function for function in found if function is not None)


def _accessors() -> frozenset[Any]:
    """Getters, setters and deleters of attributes that are not data, and the setter of `data`."""
    found = [torch.Tensor.data.__set__]  # type: ignore[attr-defined]
    for name in dir(torch.Tensor):
        attribute: Any = getattr(torch.Tensor, name, None)
        if name not in _OF_DATA and hasattr(attribute, "__get__") and hasattr(attribute, "__set__"):
            found += [attribute.__get__, attribute.__set__]
            found += [attribute.__delete__] if hasattr(attribute, "__delete__") else []
    return frozenset(found)


METADATA = (
    _accessors()
    | _named(_METADATA_METHODS)
    | {getattr(torch, name) for name in _METADATA_FUNCTIONS.split() if hasattr(torch, name)}
)
# Of their first argument; `__getitem__` and `reshape` not always.
VIEWS = _named(_VIEWS) | {getattr(torch.Tensor, name).__get__ for name in _OF_DATA}
# New tensors that take after their first argument without reading it.
LIKE = _named(_LIKE)
# Products and norms of layers, which want their operands in one dtype.
COMPUTE = _named(_COMPUTE)
_IN_PLACE_OPERATORS = frozenset(f"__{name}__" for name in _IN_PLACE.split())


def may_write(func: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation by its name, or its arguments, writes into a tensor that it is given."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _IN_PLACE_OPERATORS or kwargs.get("out") is not None
