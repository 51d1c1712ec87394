"""Kernels of hf_slideformer: AdamW, split masters and gradient norms, with the same bits on CPU and GPU.

Importing this package compiles nothing and imports no Triton: the C library is built at first use
(``build.py``), the Triton kernels are imported with the first CUDA tensor (``gpu.py``). Formulas and the
reference implementation are in ``reference.py``.
"""

from .ops import accumulate_, adamw_fp32_, adamw_split_, join_master, split_master, sum_of_squares
from .scalars import AdamWScalars, adamw_scalars

__all__ = [
    "AdamWScalars",
    "accumulate_",
    "adamw_fp32_",
    "adamw_scalars",
    "adamw_split_",
    "join_master",
    "split_master",
    "sum_of_squares",
]
