"""Parameters in the hands of code that knows nothing of the engine: what it reads, and what becomes of its writes."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional

from hf_slideformer import SlideConfig
from hf_slideformer.engine.state import access
from hf_slideformer.errors import TransferError
from tests.engine.loop import (
    all_tensors,
    assert_same_bits,
    batches,
    bits,
    decide,
    prepare,
    step,
    tiny_llama,
    train,
)

UNITS = 4
EVERY = range(UNITS)
PLACEMENTS = {
    "streamed": {},
    "resident": {"resident": (1, 2)},
    "outside in RAM": {"outside_state": "RAM"},
    "state on disk": {"on_disk": EVERY},
    "all on disk": {"on_disk": EVERY, "weights_on_disk": EVERY},
}
TOKENS = torch.arange(24).view(2, 12) % 96
NAMES = (
    "model.embed_tokens.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.3.input_layernorm.weight",
)


def model_of(dtype=torch.float32, **settings):
    model = tiny_llama(dtype, num_hidden_layers=UNITS, hidden_size=32, intermediate_size=48, **settings)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 1:  # ones have no low half
                param.add_(0.1 * torch.randn_like(param))
    return model


def placed(tmp_path, placement="streamed", *, dtype=torch.float32, update="deferred", **how):
    decisions = decide(units=UNITS, **PLACEMENTS[placement])
    nvme_dir = str(tmp_path) if decisions.on_disk else None
    config = SlideConfig(nvme_dir=nvme_dir, update=update)
    return prepare(model_of(dtype), decisions=decisions, config=config, **how)


def masters(run):
    """Exact weights by name, by a way that does not pass through parameters."""
    found = {}
    for states in run.engine.states_by_unit():
        with run.engine.state_in_memory(states):
            found |= {state.name: state.read_master().cpu().clone() for state in states}
    return found


def assert_masters(run, expected):
    found = masters(run)
    for name, value in expected.items():
        assert torch.equal(bits(found[name]), bits(value)), name


def loss_of(run, tokens=TOKENS):
    return run.model(input_ids=tokens, labels=tokens, use_cache=False).loss


READS = {
    "clone": lambda p: p.clone(),
    "detach": lambda p: p.detach().clone(),
    "data": lambda p: p.data.clone(),
    "float": lambda p: p.float(),
    "cpu": lambda p: p.data.cpu(),
    "to": lambda p: p.detach().to("cpu"),
    "double": lambda p: p.double().float(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda p: pickle.loads(pickle.dumps(p)),
    "contiguous": lambda p: p.detach().contiguous(),
    "numpy": lambda p: torch.from_numpy(p.detach().numpy()),
    "list": lambda p: torch.tensor(p.tolist()),
    "rows": lambda p: torch.stack([row.clone() for row in p.data]),
    "picked rows": lambda p: p.data[torch.arange(len(p))],
    "transposed": lambda p: p.T.clone().T if p.dim() == 2 else p.clone(),
    "slice of a view": lambda p: torch.cat([p.detach().view(-1)[:3], p.detach().view(-1)[3:]]).view(p.shape),
    "arithmetic": lambda p: 0.0 + p,
    "foreach": lambda p: torch._foreach_add([p.detach()], 0.0)[0],
    "vector": lambda p: nn.utils.parameters_to_vector([p]).view(p.shape),
}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_read_gives_the_whole_weight(tmp_path, placement):
    run = train(placed(tmp_path, placement, lr=1e-5), 2)
    expected = masters(run)
    for name in NAMES:
        param = run.model.get_parameter(name)
        assert not torch.equal(expected[name], expected[name].bfloat16().float()), "it has no low half"
        for how, read in READS.items():
            value = read(param)
            assert type(value) in (torch.Tensor, nn.Parameter), (name, how)
            assert torch.equal(value, expected[name]), (name, how)


@pytest.mark.parametrize("placement", ["streamed", "resident", "all on disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copied_model_is_what_the_model_came_in_as(tmp_path, placement, dtype):
    run = train(placed(tmp_path, placement, dtype=dtype), 2)
    copied, expected = copy.deepcopy(run.model), masters(run)
    for name, param in copied.named_parameters():
        assert type(param) is nn.Parameter and param.requires_grad and param.dtype == dtype, name
        assert torch.equal(param, expected[name].to(dtype)), name
    copied(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(param.grad is not None for param in copied.parameters())


@pytest.mark.parametrize(
    "keep",
    [
        copy.deepcopy,
        lambda state: {name: value.clone() for name, value in state.items()},
        lambda state: {name: value.detach().cpu().clone() for name, value in state.items()},
        lambda state: torch.load(_saved(state)),
    ],
)
@pytest.mark.parametrize("placement", ["streamed", "resident", "all on disk"])
def test_a_kept_state_dict_is_exact_and_goes_back_exactly(tmp_path, placement, keep):
    run = train(placed(tmp_path, placement), 2)
    before = masters(run)
    kept = keep(run.model.state_dict())
    for name, value in before.items():
        assert kept[name].dtype == torch.float32 and torch.equal(kept[name], value), name
    train(run, 1)
    run.model.load_state_dict(kept)
    assert_masters(run, before)


def _saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("keep", [copy.deepcopy, lambda state: torch.load(_saved(state))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_are_kept_once(tmp_path, dtype, keep):
    run = train(prepare(model_of(dtype, tie_word_embeddings=True), decisions=decide(units=UNITS)), 1)
    kept = keep(run.model.state_dict())
    embedding, head = kept["model.embed_tokens.weight"], kept["lm_head.weight"]
    assert embedding.dtype == dtype
    assert embedding.data_ptr() == head.data_ptr() != run.model.lm_head.weight.data_ptr()
    run.model.load_state_dict(kept)


def test_a_state_dict_takes_no_memory_of_its_own(tmp_path):
    run = train(placed(tmp_path, "resident"), 1)
    live = {state.name: state.live.data_ptr() for state in run.engine.states}
    assert {name: value.data_ptr() for name, value in run.model.state_dict().items()} == live


def _scale(params, values):
    for param in params:
        param.mul_(0.9)
    return [value * 0.9 for value in values]


def _scale_data(params, values):
    for param in params:
        param.data.mul_(0.9)
    return [value * 0.9 for value in values]


def _lerp_detached(params, values):
    torch._foreach_lerp_([p.detach() for p in params], [torch.ones_like(p) for p in params], 0.25)
    return [torch.lerp(value, torch.ones_like(value), 0.25) for value in values]


def _copy_fp32(params, values):
    for param, value in zip(params, values, strict=True):
        param.data.copy_(value + 1 / 3)
    return [value + 1 / 3 for value in values]


def _copy_from_each_other(params, values):
    params[1].copy_(params[1].detach().flip(0))
    return [values[0], values[1].flip(0), values[2]]


def _rows(params, values):
    expected = [value.clone() for value in values]
    for param, value in zip(params, expected, strict=True):
        param[0] = 1 / 3
        param.data[1].zero_()
        param.detach().view(-1)[-1:].add_(1 / 3)
        value[0], value[1] = 1 / 3, 0
        value.view(-1)[-1:].add_(1 / 3)
    return expected


def _initialise(params, values):
    for param in params:
        nn.init.constant_(param, 1 / 3)
    return [torch.full_like(value, 1 / 3) for value in values]


def _out(params, values):
    torch.add(params[0], 1 / 3, out=params[0].data)
    return [values[0] + 1 / 3, *values[1:]]


def _clamp_by_another(params, values):
    params[1].sub_(params[1].detach(), alpha=0.5)
    return [values[0], values[1] - 0.5 * values[1], values[2]]


WRITES = (
    _scale,
    _scale_data,
    _lerp_detached,
    _copy_fp32,
    _copy_from_each_other,
    _rows,
    _initialise,
    _out,
    _clamp_by_another,
)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_writes_reach_the_whole_weight(tmp_path, placement):
    run = train(placed(tmp_path, placement), 1)
    for write in WRITES:
        before = masters(run)
        params = [run.model.get_parameter(name) for name in NAMES]
        with torch.no_grad():
            written = write(params, [before[name].clone() for name in NAMES])
        assert_masters(run, before | dict(zip(NAMES, written, strict=True)))
    loss_of(run)  # and copies on the device have followed
    weight = run.model.get_parameter("model.layers.3.mlp.down_proj.weight")
    first = loss_of(run).item()
    with torch.no_grad():
        weight.data.zero_()
    assert loss_of(run).item() != first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("placement", ["streamed", "resident", "outside in RAM", "state on disk"])
def test_writing_the_half_that_is_there_keeps_the_other(tmp_path, placement, dtype):
    run = train(placed(tmp_path, placement, dtype=dtype, lr=1e-5), 2)
    before = all_tensors(run.engine)
    halves = {state.name: state.live.clone() for state in run.engine.states}
    with torch.no_grad():
        for name, param in run.model.named_parameters():
            param.copy_(halves[name])
    run.model.load_state_dict(halves)
    for name, tensors in all_tensors(run.engine).items():
        assert torch.equal(tensors["residual"], before[name]["residual"]), name
    name, changed = NAMES[1], halves[NAMES[1]].clone()
    changed[0] = 0.25
    with torch.no_grad():
        run.model.get_parameter(name).copy_(changed)
    after = all_tensors(run.engine)[name]
    assert torch.equal(after["weight"].cpu(), changed)
    assert not after["residual"][0].any()
    assert torch.equal(after["residual"][1:], before[name]["residual"][1:])
    assert after["residual"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_weights_that_are_the_same_by_chance_are_what_was_written(tmp_path, dtype):
    run = train(placed(tmp_path, dtype=dtype, lr=1e-5), 2)
    name, halves = NAMES[1], {state.name: state.live.clone() for state in run.engine.states}
    others = torch.full_like(halves[name], 0.5)
    others[3] = halves[name][3]
    with torch.no_grad():
        run.model.get_parameter(name).copy_(others)
    assert not all_tensors(run.engine)[name]["residual"].any()


def test_parameters_compare_with_tensors_in_tests(tmp_path):
    run = train(placed(tmp_path, bf16=False), 1)
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(value, nn.Parameter(masters(run)[name]), rtol=0, atol=0)
        torch.testing.assert_close(run.model.get_parameter(name), masters(run)[name], rtol=0, atol=0)


def test_weights_that_came_in_as_bf16_are_written_as_such(tmp_path):
    run = train(placed(tmp_path, dtype=torch.bfloat16, lr=1e-5), 2)
    param, before = run.model.get_parameter(NAMES[1]), all_tensors(run.engine)[NAMES[1]]
    weight, residual = before["weight"].clone(), before["residual"].clone()
    assert param.clone().dtype == torch.bfloat16 and residual[1:].any()
    with torch.no_grad():
        param[0].add_(1.0)
        param[1].mul_(1.0)
    after = all_tensors(run.engine)[NAMES[1]]
    assert torch.equal(after["weight"][0], weight[0] + 1.0)
    assert torch.equal(after["residual"][1:], residual[1:])


def test_writing_a_leaf_that_gets_gradients_is_torchs_error(tmp_path):
    run = placed(tmp_path, "resident")
    before = masters(run)
    for name in NAMES:
        param = run.model.get_parameter(name)
        for write in (
            lambda p: p.mul_(2),
            lambda p: p.view(-1).zero_(),
            lambda p: p.copy_(p),
            lambda p: p[0].fill_(1),
        ):
            with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
                write(param)
    assert_masters(run, before)


@pytest.mark.parametrize("placement", ["streamed", "resident"])
def test_inference_mode_reads_and_writes_as_well(tmp_path, placement):
    run = train(placed(tmp_path, placement), 1)
    before = masters(run)
    with torch.inference_mode():
        for name in NAMES:
            param = run.model.get_parameter(name)
            assert torch.equal(param.clone(), before[name])
            param.mul_(0.5)
    assert_masters(run, {name: before[name] * 0.5 for name in NAMES})


# -- while updates are pending ---------------------------------------------------------------------------------


def slow_updates(label):
    return 0.05 if "layers" in label or "outside" in label else 0.0


def stepped(run, update="deferred"):
    """One step whose updates take a while."""
    loss_of(run).backward()
    if update == "deferred":
        run.engine.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.optimizer.zero_grad()


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(
    ("placement", "update"),
    [(name, "deferred") for name in PLACEMENTS] + [("streamed", "overlapped"), ("all on disk", "overlapped")],
)
def test_weights_read_right_after_a_step_are_updated(tmp_path, placement, update, bf16):
    run = placed(tmp_path, placement, update=update, bf16=bf16, delays={"update": slow_updates})
    held = {name: value for name, value in run.model.state_dict().items() if name in NAMES}
    before = masters(run)
    reads = {
        "clone": lambda p, name: p.detach().clone(),
        "held since before": lambda p, name: held[name].clone(),
        "penalty": lambda p, name: (p - before[name]).square().sum().detach(),
    }
    for how, read in reads.items():
        stepped(run, update)
        found = {name: read(run.model.get_parameter(name), name) for name in NAMES}
        after = masters(run)
        for name in NAMES:
            assert not torch.equal(after[name], before[name]), (how, name)
            wanted = (after[name] - before[name]).square().sum() if how == "penalty" else after[name]
            assert torch.equal(found[name], wanted), (how, name)


def test_weights_written_right_after_a_step_are_what_was_written(tmp_path):
    run = placed(tmp_path, delays={"update": slow_updates})
    stepped(run)
    with torch.no_grad():
        run.model.get_parameter(NAMES[1]).data[0] = 0.5
    assert (masters(run)[NAMES[1]][0] == 0.5).all()


def test_what_asks_for_no_data_does_not_wait(tmp_path):
    may_go = threading.Event()
    delays = {"update": lambda label: 0.0 if may_go.wait(30) else 0.0}
    run = placed(tmp_path, delays=delays)
    stepped(run)
    try:
        for param in run.model.parameters():
            described = (
                param.shape,
                param.dtype,
                param.device,
                param.grad,
                param.requires_grad,
                param.is_leaf,
            )
            described += (param.numel(), param.size(0), param.is_contiguous(), param.data_ptr(), len(param))
            described += (torch.numel(param), hash(param), param.is_floating_point(), torch.zeros_like(param))
            assert len(described) == 15
        assert isinstance(run.model.get_parameter(NAMES[1]), nn.Parameter)
        nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        update = next(unit.group.pending for unit in run.engine.executor.units if unit.group.pending)
        assert not update.is_complete
    finally:
        may_go.set()
    run.engine.synchronize()


def test_reading_what_a_failed_update_has_left_raises(tmp_path):
    def fail(label):
        if "layers.1" in label:
            raise OSError("no more")
        return 0.0

    run = placed(tmp_path, delays={"update": fail})
    stepped(run)
    run.model.get_parameter("model.layers.0.mlp.up_proj.weight").detach().clone()
    for read in (torch.clone, copy.deepcopy, lambda p: p.data + 1):
        with pytest.raises(TransferError, match=r"layers\.1 failed: no more"):
            read(run.model.get_parameter(NAMES[1]))


# -- in a loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["streamed", "resident", "outside in RAM"])
@pytest.mark.parametrize(
    "penalty",
    [
        lambda p, start: (p - start).square().sum(),
        lambda p, start: functional.mse_loss(p, start + 0.01, reduction="sum"),
        lambda p, start: (p.T @ p - torch.eye(p.shape[-1])).square().mean() if p.dim() == 2 else p.norm(),
        lambda p, start: p.view(-1)[3:].abs().sum() + p.float().sum(),
    ],
)
def test_a_penalty_is_that_of_the_whole_weights(tmp_path, placement, penalty):
    run = train(placed(tmp_path, placement, lr=1e-5), 2)
    start = {name: value * (1 + 1e-5) for name, value in masters(run).items()}
    plain = copy.deepcopy(run.model)
    losses = []
    for model in (plain, run.model):
        named = dict(model.named_parameters())
        losses.append(sum(penalty(named[name], start[name]) for name in NAMES))
        losses[-1].backward()
    assert torch.equal(losses[0], losses[1])
    for name in NAMES:
        expected, found = plain.get_parameter(name).grad, run.model.get_parameter(name).grad
        torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-8, msg=name)


def test_products_with_hidden_states_are_computed_as_in_layers(tmp_path):
    run = train(placed(tmp_path), 1)
    head = run.model.lm_head.weight
    live = next(state.live for state in run.engine.states if state.param is head)
    hidden = torch.randn(3, 32).bfloat16()
    for compute in (
        functional.linear,
        lambda h, w: h @ w.T,
        lambda h, w: torch.matmul(h, w.detach().t()),
        lambda h, w: torch.einsum("bh,vh->bv", h, w),
    ):
        assert torch.equal(compute(hidden, head), compute(hidden, live))
    assert functional.linear(hidden.float(), head).dtype == torch.float32


# -- training is not touched -------------------------------------------------------------------------------------


class _Reader(nn.Module):
    """A part of a layer that looks at its weights in ways that would tell a half from a whole."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(1 + 0.1 * torch.randn(inner.gate_proj.in_features))

    def forward(self, hidden):
        hidden = self.inner(hidden) * self.scale.to(hidden.dtype)
        return hidden * (self.scale.float() - self.scale.detach() + self.scale.data).to(hidden.dtype)


def test_model_code_sees_what_computes_wherever_it_is(tmp_path):
    def run(**decisions):
        model = model_of()
        for layer in model.model.layers:
            layer.mlp = _Reader(layer.mlp)
        return train(prepare(model, decisions=decide(units=UNITS, **decisions)), 3)

    streamed = run()
    assert_same_bits(run(resident=EVERY), streamed)
    assert_same_bits(run(resident=EVERY, keep=EVERY), streamed)


@pytest.mark.parametrize("placement", ["streamed", "resident", "outside in RAM"])
def test_guarded_parameters_change_no_bit(tmp_path, placement, monkeypatch):
    guarded = train(placed(tmp_path, placement), 2)
    monkeypatch.setattr(access, "guard_parameter", lambda *_: None)
    assert_same_bits(train(placed(tmp_path, placement), 2), guarded)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_forward_leaves_whole_weights(tmp_path, error):
    run = train(placed(tmp_path, "resident"), 1)
    expected = masters(run)

    def interrupt(*_):
        raise error("stop")

    hook = run.model.model.layers[2].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        loss_of(run)
    hook.remove()
    run.engine.reset()
    for name in NAMES:
        assert torch.equal(run.model.get_parameter(name).detach().clone(), expected[name])
    loss_of(run)
    assert torch.equal(run.model.get_parameter(NAMES[0]).clone(), expected[NAMES[0]])


def test_parameters_are_ordinary_again_when_they_are_let_go(tmp_path):
    run = train(placed(tmp_path, "resident"), 1)
    run.engine._access.unguard()
    for param in run.model.parameters():
        assert type(param) is nn.Parameter and not hasattr(param, "_guard")
        assert type(param.detach()) is torch.Tensor
    assert not any(module._forward_hooks for module in run.model.modules())


def test_other_optimizers_of_torch_meet_the_whole_weights(tmp_path):
    run = train(placed(tmp_path), 1)
    before = masters(run)
    param = run.model.get_parameter(NAMES[1])
    param.grad = torch.ones_like(param, dtype=param.dtype)
    torch.optim.SGD([param], lr=2**-20, foreach=True).step()
    assert_masters(run, {NAMES[1]: before[NAMES[1]] - 2**-20})
    param.grad = None


def test_a_forward_in_another_thread_does_not_show_halves(tmp_path):
    run = train(placed(tmp_path), 1)
    expected, found = masters(run), []
    reached, read = threading.Event(), threading.Event()

    def pause(*_):
        reached.set()
        assert read.wait(30)

    hook = run.model.model.layers[1].mlp.register_forward_pre_hook(pause)
    thread = threading.Thread(target=lambda: loss_of(run))
    thread.start()
    assert reached.wait(30)
    found.append(run.model.get_parameter(NAMES[0]).clone())
    read.set()
    thread.join()
    hook.remove()
    assert torch.equal(found[0], expected[NAMES[0]])


def test_steps_go_on_from_what_was_written(tmp_path):
    runs = [placed(tmp_path), placed(tmp_path, "resident")]
    for run in runs:
        train(run, 1)
        with torch.no_grad():
            for param in run.model.parameters():
                param.data.mul_(0.75)
        step(run, batches(1, seed=9), max_norm=1.0)
        run.engine.synchronize()
    assert_same_bits(*runs)


@pytest.mark.gpu
@pytest.mark.parametrize("placement", ["streamed", "resident", "outside in RAM"])
def test_reads_and_writes_on_the_gpu(tmp_path, placement):
    run = placed(tmp_path, placement, device="cuda", delays={"update": slow_updates})
    for _ in range(2):
        run.model(input_ids=TOKENS.cuda(), labels=TOKENS.cuda(), use_cache=False).loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        read = {name: run.model.get_parameter(name).detach().clone() for name in NAMES}
        before = masters(run)
        for name, value in read.items():
            assert value.dtype == torch.float32 and torch.equal(value.cpu(), before[name]), name
    kept = copy.deepcopy(run.model.state_dict())
    halves = {state.name: state.live.clone() for state in run.engine.states}
    run.model.load_state_dict(halves)
    assert_masters(run, before)
    with torch.no_grad():
        for param in run.model.parameters():
            param.data.mul_(0.9)
    assert_masters(run, {name: value * 0.9 for name, value in before.items()})
    run.model.load_state_dict(kept)
    assert_masters(run, before)
