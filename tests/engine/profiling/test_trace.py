"""Profiles made without data agree with real runs, and making one leaves no trace."""

import json
import logging
import resource
import time
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from hf_slideformer import SlideConfig
from hf_slideformer.engine.profiling import trace as engine_profile
from hf_slideformer.engine.profiling.allocations import AllocationTracker, block_bytes
from hf_slideformer.engine.profiling.fakes import on_fake_tensors
from hf_slideformer.errors import UnsupportedModelError
from tests.engine.loop import prepare, tiny_llama, train
from tests.parity import models

from .measured import PlainRun, predicted_gpu_peak, profile, profile_of_real_run

FAMILIES = ["llama", "qwen2", "gemma3_text", "gemma2", "gpt2", "bert", "t5"]


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_as_with_real_tensors(family, bf16):
    model = models.build(family)
    found = profile(model, bf16=bf16)
    assert found.source == "traced"
    assert found == profile_of_real_run(model, bf16=bf16)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
def test_saved_bytes_are_the_storages_that_autograd_saves(family):
    model = models.build(family)
    assert profile(model).units[0].saved_bytes == PlainRun(model).saved_bytes


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("loss", ["model", "fused"])
def test_the_engine_allocates_what_the_profile_says(loss, bf16):
    batch, seq = 8, 64
    model = tiny_llama(torch.float32, vocab_size=512)
    found = profile(model, batch_size=batch, seq_len=seq, bf16=bf16, fused_loss=loss == "fused")
    run = prepare(model, bf16=bf16, config=SlideConfig(loss=loss))
    train(run, 1, batch=batch, seq=seq, autocast=bf16)
    tokens = torch.zeros(batch, seq, dtype=torch.int64)
    tracker = AllocationTracker()
    with tracker:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss_value = model(input_ids=tokens, labels=tokens.clone(), use_cache=False).loss
        loss_value.backward()
    grads = [
        sum(block_bytes(s.spec.numel * s.spec.dtype.itemsize) for s in layout.segments)
        for layout in run.engine._blueprint.layouts
    ]
    head, embedding = (
        block_bytes(model.lm_head.weight.nbytes),
        block_bytes(model.model.embed_tokens.weight.nbytes),
    )
    predicted = predicted_gpu_peak(
        found, grads, head + block_bytes(model.model.norm.weight.nbytes), embedding
    )
    assert predicted / 1.03 <= tracker.peak <= predicted


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_bytes_and_work_grow_with_tokens(device_type):
    model = models.build("llama", max_position_embeddings=2048)
    one, two = (profile(model, batch_size=b, seq_len=128, device_type=device_type).units[1] for b in (4, 8))
    for name in ("boundary_bytes", "saved_bytes", "forward_bytes", "forward_flops", "forward_traffic"):
        assert getattr(two, name) == pytest.approx(2 * getattr(one, name), rel=0.01), name
    assert two.backward_bytes > 1.9 * one.backward_bytes
    assert two.recompute_share == one.recompute_share < 1.0  # the last product is not repeated


def test_flops_are_those_of_grouped_queries_and_causal_attention():
    batch, seq, hidden, inner, kv = 2, 64, 32, 64, 16
    unit = profile(models.build("llama"), batch_size=batch, seq_len=seq).units[0]
    products = 2 * batch * seq * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    attention = 4 * batch * seq * seq * hidden // 2
    assert unit.forward_flops == products + attention
    assert unit.recompute_share == pytest.approx(1 - 2 * batch * seq * hidden * inner / unit.forward_flops)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_only_eager_attention_saves_scores(device_type):
    batch, seq, heads = 1, 512, 4
    saved = {
        kind: profile(
            models.build("llama", attn_implementation=kind, max_position_embeddings=seq),
            batch_size=batch,
            seq_len=seq,
            device_type=device_type,
        )
        for kind in ("sdpa", "eager")
    }
    scores = batch * heads * seq * seq
    extra = saved["eager"].units[0].saved_bytes - saved["sdpa"].units[0].saved_bytes
    assert 4 * scores < extra < 12 * scores
    assert saved["eager"].held_bytes > saved["sdpa"].held_bytes + batch * seq * seq  # the mask
    assert saved["sdpa"].held_bytes < seq * seq


def test_on_a_gpu_dropout_needs_no_scores():
    seq = 512
    kwargs = dict(batch_size=1, seq_len=seq)
    model = models.build("gpt2", n_positions=seq)  # attention dropout of 0.1
    on_cpu, on_gpu = (profile(model, device_type=kind, **kwargs).units[0] for kind in ("cpu", "cuda"))
    assert on_cpu.saved_bytes - on_gpu.saved_bytes > 4 * 4 * seq * seq


def test_on_a_gpu_autocast_runs_layer_norms_in_fp32():
    seq = 128
    kwargs = dict(batch_size=2, seq_len=seq)
    model = models.build("bert", max_position_embeddings=seq)  # its layers end in a norm
    on_cpu, on_gpu = (profile(model, device_type=kind, **kwargs).units[1] for kind in ("cpu", "cuda"))
    assert on_gpu.boundary_bytes == 2 * on_cpu.boundary_bytes == 4 * 2 * seq * 32


def test_flash_attention_is_profiled_as_torchs_own():
    model, other = models.build("llama"), models.build("llama")
    other.config._attn_implementation = "flash_attention_2"
    assert profile(other, device_type="cuda") == profile(model, device_type="cuda")
    assert other.config._attn_implementation == "flash_attention_2"


def test_the_fused_loss_holds_its_gradients_and_one_chunk_of_logits():
    rows, hidden, vocabulary = 2 * 64, 64, 4096
    model = tiny_llama(vocab_size=vocabulary)
    found = profile(model, seq_len=64, fused_loss=True, device_type="cuda")
    weight = vocabulary * hidden
    # Forward: fp32 gradients of weight and hidden states, losses, and all logits in bf16, since they fit the budget;
    # the norm saves its input in fp32, twice, and its result. The head's own gradient is counted elsewhere.
    expected = 4 * weight + 4 * rows * hidden + 2 * rows * vocabulary + 4 * rows - 2 * weight
    assert expected <= found.loss_bytes <= expected + 20 * rows * hidden
    assert found.loss_flops == 3 * 2 * rows * vocabulary * hidden
    left = profile(model, seq_len=64, fused_loss=False, device_type="cuda")
    assert left.loss_bytes > 10 * rows * vocabulary - 2 * weight
    assert left.units == found.units


@pytest.fixture
def logged_by_torch():
    """What torch logs of operators that it knows no shapes for; its loggers hand nothing on to others."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addHandler(handler)
    yield records
    log.removeHandler(handler)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_in_fp32_are_traced(family, logged_by_torch):
    found = profile(models.build(family), bf16=False)
    assert found.source == "traced" and not logged_by_torch
    half = profile(models.build(family), bf16=True)
    for ours, theirs in zip(found.units, half.units, strict=True):
        assert ours.forward_flops == theirs.forward_flops
        assert theirs.saved_bytes < ours.saved_bytes < 2.1 * theirs.saved_bytes


def test_an_operator_without_shapes_is_estimated_in_silence(logged_by_torch):
    def of_no_shape(x):
        return torch._grouped_mm(x.detach(), x.detach())

    model = tiny_llama()
    model.model.norm.register_forward_hook(lambda module, args, output: of_no_shape(output[0]))
    found = profile(model)
    assert found.source == "estimated"
    assert not logged_by_torch
    with FakeTensorMode(), pytest.raises(Exception):  # noqa: B017, PT011 - whatever torch raises
        of_no_shape(torch.empty(4, 4))
    assert logged_by_torch  # it would have said so, and says so again


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_count_as_far_as_they_are_active(family):
    few, all_of_them = (
        profile(models.build(family, num_experts_per_tok=count)).units[-1] for count in (1, 4)
    )
    assert 2 * few.forward_flops < all_of_them.forward_flops < 4 * few.forward_flops
    assert few.saved_bytes < all_of_them.saved_bytes


def test_layers_of_different_kinds_have_figures_of_their_own():
    units = profile(models.build("gemma3_text"), seq_len=64, device_type="cuda").units
    sliding, full = units[0], units[2]  # only the window needs a mask
    assert units[1] == units[3]
    assert sliding.saved_bytes > full.saved_bytes and sliding.forward_flops > full.forward_flops


def test_frozen_layers_keep_nothing():
    model = models.build("llama")
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    first, second, third = profile(model).units
    assert first.saved_bytes == first.backward_bytes == first.boundary_bytes == 0
    assert first.forward_flops == second.forward_flops
    assert second.saved_bytes > 0
    assert second.backward_bytes <= third.backward_bytes  # no gradient of its input is wanted


# -- no trace is left ----------------------------------------------------------------------------------------------


def _state(model):
    return {
        "bits": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "identities": [id(p) for p in model.parameters()],
        "versions": [p._version for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "training": [module.training for module in model.modules()],
        "config": model.config.to_dict(),
    }


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("not today")


def _launcher():
    jit = pytest.importorskip("triton.runtime.jit")
    return jit.JITFunction.run


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_model_and_the_process_are_left_as_they_were(family, fails):
    model = models.build(family).eval()
    list(model.parameters())[-1].requires_grad_(False)
    if fails:
        layers = model.transformer.h if family == "gpt2" else model.model.layers
        layers[1].register_forward_hook(lambda module, args, output: _Fails.apply(output))
    before, launcher, equal = _state(model), _launcher(), torch.equal
    generator = torch.get_rng_state()
    found = profile(model, device_type="cuda", fused_loss=True)
    assert found.source == ("estimated" if fails else "traced")
    after = _state(model)
    bits, kept = before.pop("bits"), after.pop("bits")
    assert before == after
    assert bits.keys() == kept.keys() and all(equal(bits[name], kept[name]) for name in bits)
    assert torch.equal(generator, torch.get_rng_state())
    assert _launcher() is launcher and torch.equal is equal
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    assert type(torch.zeros(1)) is torch.Tensor


def test_kernels_are_launched_for_real_tensors_and_counted_for_fake_ones():
    jit = pytest.importorskip("triton.runtime.jit")
    launched = []

    class Kernel(jit.JITFunction):
        def __init__(self):
            pass

    original = jit.JITFunction.run
    jit.JITFunction.run = lambda self, *args, grid, warmup, **kwargs: launched.append(args)
    try:
        tracker = AllocationTracker()
        fakes = FakeTensorMode()
        with fakes:
            fake = torch.empty(100, dtype=torch.float32)
        with on_fake_tensors(tracker, cuda=True):
            Kernel()[(1,)](fake, 3)
            Kernel()[(1,)](torch.ones(2), 3)
    finally:
        jit.JITFunction.run = original
    assert len(launched) == 1 and torch.equal(launched[0][0], torch.ones(2))
    assert tracker.traffic == 400


def test_random_states_and_the_default_device_do_not_matter():
    model = tiny_llama()
    expected = profile(model, device_type="cuda")
    with torch.device("meta"), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert profile(model, device_type="cuda") == expected


# -- models without weights, large models, models that cannot be traced --------------------------------------------


def test_a_model_without_weights_has_the_same_profile():
    settings = tiny_llama().config
    with torch.device("meta"):
        on_meta = LlamaForCausalLM(settings).to(torch.bfloat16)
    with (
        FakeTensorMode()
    ):  # made in its dtype: whether fake parameters can be converted depends on what ran before
        fake = LlamaForCausalLM._from_config(settings, dtype=torch.bfloat16)
    expected = profile(tiny_llama(), device_type="cuda")
    assert profile(on_meta, device_type="cuda") == expected
    assert profile(fake, device_type="cuda") == expected


def test_a_large_model_takes_seconds_and_no_memory(monkeypatch):
    monkeypatch.setattr(engine_profile, "_MOST_SECONDS", 200.0)  # others may be busy beside it
    config = MistralConfig(
        vocab_size=32768,
        hidden_size=12288,
        intermediate_size=28672,
        num_hidden_layers=88,
        num_attention_heads=96,
        num_key_value_heads=8,
        head_dim=128,
        sliding_window=None,
    )
    with torch.device("meta"):
        model = MistralForCausalLM(config).to(torch.bfloat16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()  # others may be busy beside it
    found = profile(model, batch_size=1, seq_len=4096, fused_loss=True, device_type="cuda")
    assert time.process_time() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert found.source == "traced" and len(found.units) == 88 and len(set(found.units)) == 1
    assert found.units[0].boundary_bytes == 2 * 4096 * 12288
    numel = 12288 * (2 * 96 * 128 + 2 * 8 * 128 + 3 * 28672)
    assert found.units[0].forward_flops == 2 * 4096 * numel + 4 * 4096**2 * 12288 // 2


def test_experts_in_a_loop_are_estimated():
    model = models.build("mixtral", experts_implementation="eager", max_position_embeddings=128)
    found = profile(model, seq_len=128)
    assert found.source == "estimated"
    assert "DynamicOutputShapeException" in found.notes[0]
    traced = profile(models.build("mixtral", max_position_embeddings=128), seq_len=128)
    assert_at_least(found, traced)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "sdpa"), ("llama", "eager"), ("gemma2", "eager"), ("gpt2", "sdpa"), ("qwen3_moe", "eager")],
)
@pytest.mark.parametrize("fused", [False, True])
def test_estimates_are_not_too_low(family, kind, fused, monkeypatch):
    longest = {"n_positions" if family == "gpt2" else "max_position_embeddings": 256}
    model = models.build(family, attn_implementation=kind, **longest)
    traced = profile(model, seq_len=256, fused_loss=fused, device_type="cuda")

    def fail(*args):
        raise NotImplementedError("for the test")

    monkeypatch.setattr("hf_slideformer.engine.profiling.trace.fake_copy", fail)
    found = profile(model, seq_len=256, fused_loss=fused, device_type="cuda")
    assert found.source == "estimated" and "for the test" in found.notes[0]
    assert_at_least(found, traced)


def assert_at_least(estimated, traced):
    assert estimated.held_bytes >= traced.held_bytes
    assert estimated.loss_bytes >= traced.loss_bytes
    assert estimated.loss_flops >= traced.loss_flops
    for mine, other in zip(estimated.units, traced.units, strict=True):
        for name in ("boundary_bytes", "saved_bytes", "forward_bytes", "backward_bytes", "forward_flops"):
            assert getattr(mine, name) >= getattr(other, name), name


def test_a_model_without_units_is_refused():
    with pytest.raises(UnsupportedModelError):
        profile(torch.nn.Linear(2, 2))


# -- against an H100 -----------------------------------------------------------------------------------------------

_ROWS = Path(__file__).parents[3] / "docs/benchmarks/2026-11-22-h100-kernels/throughput.jsonl"


def test_peaks_that_were_measured_on_an_h100():
    """Llama-3.1-8B shapes with Liger's layers, everything streamed, clipped: rows that are kept in docs/benchmarks."""
    liger = pytest.importorskip("liger_kernel.transformers")
    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        )
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    liger._apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=False, cross_entropy=False)
    head, norm = 2 * 128256 * 4096, 2 * 4096
    unit = sum(2 * p.numel() for p in model.model.layers[0].parameters())
    # Three slots; weights, residuals and fp32 moments outside of units; two workspaces of cuBLAS; a squared norm for
    # each gradient of three units.
    state = 3 * unit + 6 * (2 * head + norm) + 2 * 2**25 + 3 * 9 * 512
    rows = [json.loads(line) for line in _ROWS.read_text().splitlines()]
    clipped = [row for row in rows if row["config"]["max_grad_norm"] == 1.0 and not row["config"]["slide"]]
    assert sorted(row["config"]["batch_size"] for row in clipped) == [8, 16, 32]
    for row in clipped:
        found = profile(
            model, batch_size=row["config"]["batch_size"], seq_len=1024, fused_loss=True, device_type="cuda"
        )
        assert found.source == "traced"
        predicted = state + predicted_gpu_peak(found, [unit] * 32, head + norm, head)
        assert row["gpu_peak_allocated_bytes"] <= predicted <= 1.001 * row["gpu_peak_allocated_bytes"]


# -- Liger's layers, and time --------------------------------------------------------------------------------------


def test_liger_is_applied_to_the_copy_only(monkeypatch):
    """A stand-in for Liger Kernel that replaces a function of a module, a class's method, and an instance's."""
    from transformers.integrations import liger
    from transformers.models.llama import modeling_llama

    def apply(model, config):
        assert config == {"rope": True}
        modeling_llama.apply_rotary_pos_emb = lambda q, k, cos, sin, *args, **kwargs: (q * 1, k * 1)
        modeling_llama.LlamaRMSNorm.forward = lambda self, x: x * 1
        for layer in model.model.layers:
            layer.mlp.forward = lambda x: x * 1

    monkeypatch.setattr(liger, "apply_liger_kernel", apply)
    monkeypatch.setattr(engine_profile, "is_liger_kernel_available", lambda: True)
    model = tiny_llama()
    before = (modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm.forward)
    plain, replaced = profile(model), profile(model, liger={"rope": True})
    assert replaced.source == "traced"
    assert replaced.units[0].saved_bytes < plain.units[0].saved_bytes
    assert replaced.units[0].forward_flops < plain.units[0].forward_flops
    assert (modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm.forward) == before
    assert "forward" not in vars(model.model.layers[0].mlp)
    assert profile(model) == plain


def test_without_liger_installed_plain_layers_are_profiled(monkeypatch):
    monkeypatch.setattr(engine_profile, "is_liger_kernel_available", lambda: False)
    assert profile(tiny_llama(), liger={}) == profile(tiny_llama())


def test_code_that_takes_too_long_is_estimated(monkeypatch):
    monkeypatch.setattr(engine_profile, "_MOST_SECONDS", 0.0)
    found = profile(tiny_llama())
    assert found.source == "estimated"
    assert any("more than 0 s to trace" in note for note in found.notes)
