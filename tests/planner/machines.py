"""Machines and models for the planner's tests: the H100 machine of the rows, and Llamas with Liger's layers."""

import dataclasses
from pathlib import Path

import torch

from hf_slideformer.machine.hardware import Hardware
from hf_slideformer.memory.layout import MomentFormat, MomentPart, ParamSpec, lay_out
from hf_slideformer.planner.profile import ModelProfile, UnitProfile
from hf_slideformer.planner.workload import Workload

GIB = 2**30
MIB = 2**20

# The machine as `slideformer probe` measured it, and another of its kind, which is the middle of the four that were
# measured. In H100 and OTHER_H100 the 8-bit rate on the CPU is that of the kernel with which the streamed 8-bit row was
# made.
_PROBES = Path(__file__).parents[2] / "docs/benchmarks/2026-11-22-h100-plan"
PROBED = Hardware.from_file(_PROBES / "probe.json")


def _with_earlier_kernel(machine):
    return dataclasses.replace(
        machine,
        cpu_update=machine.cpu_update | {"8bit": 7.3e9},
        cpu_update_loaded=machine.cpu_update_loaded | {"8bit": 4.7e9},
    )


H100 = _with_earlier_kernel(PROBED)
OTHER_H100 = _with_earlier_kernel(Hardware.from_file(_PROBES / "probe-third-machine.json"))

# Moments of other rules than AdamW, of whose updates no machine was measured: none, one, and one in blocks.
NO_MOMENTS = MomentFormat("sgd", ())
ONE_MOMENT = MomentFormat("lion", (MomentPart("exp_avg", torch.float32),))
ONE_IN_BLOCKS = MomentFormat(
    "lion-8bit", (MomentPart("exp_avg", torch.int8), MomentPart("exp_avg_scale", torch.float32, 32))
)
UNMEASURED = (NO_MOMENTS, ONE_MOMENT, ONE_IN_BLOCKS)


def spec(name, *shape, dtype=torch.bfloat16, trainable=True, source=None):
    return ParamSpec(name, shape, dtype, source or dtype, dtype == torch.bfloat16, trainable)


def llama_layer(hidden=4096, kv=1024, inner=14336, queries=None, bias=False):
    """The parameters of one decoder layer; `queries` is the width of all query heads, `bias` that of q, k and v."""
    queries = queries or hidden
    biases = [spec("q_bias", queries), spec("k_bias", kv), spec("v_bias", kv)] if bias else []
    return [
        spec("q", queries, hidden),
        spec("k", kv, hidden),
        spec("v", kv, hidden),
        *biases,
        spec("o", hidden, queries),
        spec("gate", inner, hidden),
        spec("up", inner, hidden),
        spec("down", hidden, inner),
        spec("input_norm", hidden),
        spec("post_norm", hidden),
    ]


def llama_profile(
    batch_size,
    seq_len=1024,
    *,
    layers=32,
    hidden=4096,
    kv=1024,
    inner=14336,
    queries=None,
    vocabulary=128256,
):
    """Activations with Liger's layers and the fused loss, from shapes: (tokens, width) tensors in bf16.

    At 8,192 tokens a layer saves 1.06 GiB and its input is 64 MiB, as measured.
    """
    tokens = batch_size * seq_len
    queries = queries or hidden
    matrices = 2 * queries * hidden + 2 * kv * hidden + 3 * inner * hidden
    products = 2 * tokens * matrices
    attention = 2 * batch_size * seq_len**2 * queries  # two products, of which the causal mask leaves half
    row = 2 * tokens
    unit = UnitProfile(
        boundary_bytes=row * hidden,
        # Two norms' outputs, q, k, v and attention's output, the sum after attention, gate, up and their product.
        saved_bytes=row * (3 * hidden + 2 * queries + 2 * kv + 3 * inner),
        forward_bytes=row * (3 * hidden + 3 * inner),
        backward_bytes=row * (3 * hidden + 2 * inner),
        forward_flops=products + attention,
        # As traced: norms, sums, rotary embeddings, SwiGLU, copies to other layouts.
        forward_traffic=row * (24 * hidden + 12 * kv + 4.5 * inner),
        recompute_share=1 - 2 * tokens * inner * hidden / (products + attention),
        attention_flops=attention,
    )
    logits = min(tokens * vocabulary * 2, GIB)
    return ModelProfile(
        batch_size=batch_size,
        seq_len=seq_len,
        units=(unit,) * layers,
        held_bytes=row * 2 * hidden + 2 * row * 128,
        loss_bytes=4 * vocabulary * hidden + logits + 4 * tokens * hidden,
        loss_flops=6 * tokens * hidden * vocabulary,
        loss_traffic=18.5 * tokens * vocabulary + 6 * vocabulary * hidden,  # as traced
    )


def llama(
    batch_size=8,
    seq_len=1024,
    *,
    layers=32,
    hidden=4096,
    kv=1024,
    inner=14336,
    queries=None,
    bias=False,
    tied=False,
    vocabulary=128256,
    **settings,
):
    """Training of Llama-3.1-8B, or of a model of that kind with other sizes; a `tied` head is the embedding."""
    sizes = {"hidden": hidden, "kv": kv, "inner": inner, "queries": queries}
    settings.setdefault(
        "profile", llama_profile(batch_size, seq_len, layers=layers, vocabulary=vocabulary, **sizes)
    )
    head = () if tied else (spec("head", vocabulary, hidden),)
    return Workload(
        layouts=(lay_out(llama_layer(**sizes, bias=bias)),) * layers,
        outside=(spec("embedding", vocabulary, hidden), spec("norm", hidden), *head),
        last_gradients=frozenset() if tied else frozenset({"embedding"}),
        **settings,
    )
