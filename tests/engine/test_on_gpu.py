"""What only a GPU shows: weights that are elsewhere than code looks, a second device, a device that fails."""

import subprocess
import sys

import pytest
import torch

from hf_slideformer import SlideConfig
from hf_slideformer.engine.engine import SlideEngine
from hf_slideformer.engine.model.setup import Setup
from tests.engine.run.test_repeated import MODELS, ORDERS, train_by
from tests.engine.state.test_gradients import Checkpointed, Model, Tiled, gradients, make, stream

from .loop import assert_same_bits, decide, prepare, tiny_llama

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("backwards", "announced"), ORDERS, ids=[f"{way.__name__}-{told}" for way, told in ORDERS]
)
@pytest.mark.parametrize("model", ["looped", "looped, with buffers", "encoder-decoder"])
def test_layers_that_run_twice_have_the_same_bits_wherever_they_are(
    model, backwards, announced, deterministic
):
    build, units = MODELS[model]
    placements = (
        decide(units=units, resident=range(units), keep=range(units)),
        decide(units=units, slots=2),
        decide(units=units, resident=(0,), offload=range(1, units), slots=2, outside_state="RAM"),
        decide(units=units, resident=(1,), keep=(1,), slots=2),
    )
    runs = [
        train_by(
            prepare(build(torch.bfloat16), device="cuda", decisions=decisions, accumulates=announced),
            backwards,
        )
        for decisions in placements
    ]
    for run in runs[1:]:
        assert_same_bits(run, runs[0])


@pytest.mark.parametrize("activations", ["recompute", "keep", "offload"])
@pytest.mark.parametrize("layer", [Checkpointed, Tiled])
def test_a_layer_that_checkpoints_a_part_of_itself(layer, activations, deterministic):
    x = torch.randn(4, 16, device="cuda")
    plain, ours = (make(lambda: Model(layer)) for _ in range(2))
    every = range(5)
    decisions = decide(
        units=5,
        keep=every if activations == "keep" else (),
        offload=every if activations == "offload" else (),
        slots=2,
    )
    stream(ours, decisions=decisions, device="cuda")
    for model in (plain.cuda(), ours):
        model(x).backward()
    expected = gradients(plain)
    for name, grad in gradients(ours).items():
        torch.testing.assert_close(grad.cpu(), expected[name].cpu(), rtol=1e-5, atol=1e-6, msg=name)


def _losses(device, train):
    """Of a model whose transfers take longer than its kernels."""
    model = tiny_llama(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=8)
    config = SlideConfig(placement="stream")
    if train:
        run = prepare(model, device=device, config=config)
    else:
        SlideEngine(model, Setup(device=torch.device(device), bf16=True, config=config), for_training=False)
        model.eval()
    found = []
    with torch.set_grad_enabled(train):
        for seed in range(4):
            tokens = torch.randint(96, (1, 16), generator=torch.Generator().manual_seed(seed)).to(device)
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            found.append(loss.item())
            if train:
                loss.backward()
                run.engine.clip_grad_norm_(model.parameters(), 1.0)
                run.optimizer.step()
                run.optimizer.zero_grad()
    return found


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("train", [False, True])
def test_a_device_that_is_not_the_current_one(train, deterministic):
    with torch.cuda.device(0):
        assert _losses("cuda:0", train) == _losses("cuda:1", train)


_BREAKS = """
import sys, torch
from hf_slideformer import SlideConfig
from tests.engine.loop import prepare, tiny_llama
update, micro_batches = sys.argv[1], int(sys.argv[2])
run = prepare(tiny_llama(), device="cuda", accumulates=micro_batches > 1,
              config=SlideConfig(placement="stream", update=update), delays={"update": lambda label: 0.1})
for step in range(3):
    for _ in range(micro_batches):
        ids = torch.randint(96, (2, 16), device="cuda") + (10**6 if step == 2 else 0)
        try:
            run.model(input_ids=ids, labels=ids % 96, use_cache=False).loss.backward()
        except BaseException:
            run.engine.reset()
            raise
    run.optimizer.step()
    run.optimizer.zero_grad()
    print("step", step, flush=True)
run.engine.synchronize()
"""


@pytest.mark.parametrize(("update", "micro_batches"), [("overlapped", 1), ("deferred", 1), ("deferred", 2)])
def test_a_device_side_assertion_ends_the_process(update, micro_batches):
    child = subprocess.Popen(
        [sys.executable, "-c", _BREAKS, update, str(micro_batches)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in child.stdout:
        lines.append(line)
        if line.startswith("step 1"):
            break
    try:
        rest, _ = child.communicate(timeout=15)
    except subprocess.TimeoutExpired:
        child.kill()
        raise AssertionError("it hangs: " + "".join(lines)[-2000:]) from None
    assert child.returncode != 0
    assert "device-side assert" in rest, rest[-2000:]
