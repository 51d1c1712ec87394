"""Kernels of hf_slideformer: update rules, split masters and gradient norms, with the same bits on CPU and GPU.

Importing this package compiles nothing and imports no Triton: the C library is built at first use
(``build.py``), the Triton kernels are imported with the first CUDA tensor (``gpu.py``). Formulas and the
reference implementation are in ``reference.py``.
"""

from .ops import (
    MOMENT_BLOCK_NUMEL,
    accumulate_,
    accumulate_squared_,
    adamw_,
    dequantize_moments,
    join_master,
    lion_,
    quantize_moments,
    sgd_,
    split_master,
    sum_of_squares,
)
from .scalars import AdamWScalars, LionScalars, SGDScalars, adamw_scalars, lion_scalars, sgd_scalars

__all__ = [
    "MOMENT_BLOCK_NUMEL",
    "AdamWScalars",
    "LionScalars",
    "SGDScalars",
    "accumulate_",
    "accumulate_squared_",
    "adamw_",
    "adamw_scalars",
    "dequantize_moments",
    "join_master",
    "lion_",
    "lion_scalars",
    "quantize_moments",
    "sgd_",
    "sgd_scalars",
    "split_master",
    "sum_of_squares",
]
