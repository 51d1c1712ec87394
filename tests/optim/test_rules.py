"""Lion and SGD in the engine: the same bits in every place, the bytes that were planned, and their state dicts."""

import copy

import pytest
import torch

from hf_slideformer import SlideAdamW, SlideConfig, SlideLion, SlideSGD
from hf_slideformer.errors import CheckpointError, ConfigError, StateError, UnsupportedModelError
from hf_slideformer.optim import OPTIMIZERS, optimizer_class
from tests.engine import small
from tests.engine.loop import (
    Run,
    all_tensors,
    assert_same_bits,
    assert_same_state,
    decide,
    prepare,
    tiny_llama,
    train,
)

RULES = {
    "lion": (SlideLion, {"lr": 1e-3}),
    "sgd": (SlideSGD, {"lr": 0.1}),
    "momentum": (SlideSGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "nesterov": (SlideSGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
}
STATE = {
    "lion": {"exp_avg"},
    "sgd": set(),
    "momentum": {"momentum_buffer"},
    "nesterov": {"momentum_buffer"},
}
DTYPES = {"split": torch.bfloat16, "fp32": torch.float32}


def begin(rule: str, model: torch.nn.Module | None = None, **settings) -> Run:
    kind, hyperparameters = RULES[rule]
    return prepare(
        tiny_llama(num_hidden_layers=3) if model is None else model,
        optimizer=kind,
        **(hyperparameters | settings),
    )


# -- the same bits everywhere --------------------------------------------------------------------------------

# Modes that clip and sum alike.
ALIKE = {
    "clipped": ("streamed", "kept", "offload", "mixed", "state on disk", "weights on disk"),
    "overlapped": ("overlapped", "overlapped outside in RAM", "overlapped on disk"),
    "accumulated": ("sums", "sums of offload", "sums on disk"),
}


@pytest.mark.parametrize("modes", ALIKE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_bits_do_not_depend_on_placement(tmp_path, rule, dtype, modes):
    kind, hyperparameters = RULES[rule]
    found = {}
    for mode in ALIKE[modes]:
        run = small.start(
            mode, tmp_path, DTYPES[dtype], bf16=dtype == "split", optimizer=kind, **hyperparameters
        )
        for number in range(4):
            run.losses.append(small.step(run, mode, number).item())
        run.engine.synchronize()
        assert run.engine.overlapped == (modes == "overlapped")
        found[mode] = run.losses, all_tensors(run.engine)
    losses, tensors = found.pop(ALIKE[modes][0])
    assert len(set(losses)) == 4, "the test must train"
    for mode, (others, theirs) in found.items():
        assert others == losses, mode
        for name, ours in tensors.items():
            assert set(ours) - {"weight", "residual", "step"} == STATE[rule]
            assert_same_state(theirs[name], ours, f"{mode}: {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_resident_units_have_the_bits_of_streamed_ones(rule, dtype):
    runs = [
        train(
            begin(
                rule,
                tiny_llama(DTYPES[dtype], num_hidden_layers=3),
                bf16=dtype == "split",
                decisions=decide(resident=resident, keep=resident, units=3),
            ),
            3,
            max_norm=0.5,
            autocast=dtype == "split",
        )
        for resident in ((), (1,), range(3))
    ]
    assert min(runs[0].norms) > 0.5, "the test must clip"
    assert_same_bits(runs[0], runs[1])
    assert_same_bits(runs[0], runs[2])


# -- bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_the_plan_counts_what_is_allocated(rule, dtype):
    shape = {"hidden_size": 264, "intermediate_size": 1000, "num_hidden_layers": 2, "vocab_size": 97}
    run = begin(
        rule,
        tiny_llama(DTYPES[dtype], **shape),
        bf16=dtype == "split",
        config=SlideConfig(update="overlapped"),
    )
    plan = run.engine.plan
    items = {item.what: item.nbytes for item in plan.items}
    planned = sum(items.get(what, 0) for what in ("weights", "master residuals", "moments"))
    buffers = [buffer for unit in run.engine.executor.units for buffer in unit.group.home.memory.buffers()]
    assert planned <= run.engine.host_state_bytes < planned + 4096 * len(buffers)
    expected = 4 + 4 * len(STATE[rule])
    assert run.engine.host_state_bytes / plan.host_params == pytest.approx(expected, rel=0.005)
    resident = [state for state in run.engine.states if not state.streams]
    assert items.get("resident moments", 0) == sum(
        tensor.nbytes for state in resident for tensor in state.moments.values()
    )
    assert plan.moments == run.engine.rule.format.name
    assert f"({plan.moments})" in str(plan)
    assert ("moments " in str(plan)) == bool(STATE[rule])


# -- state dicts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_state_loads_bit_for_bit(rule, dtype):
    split = dtype == "split"
    settings = {"bf16": split, "config": SlideConfig()}
    run = train(begin(rule, tiny_llama(DTYPES[dtype]), **settings), 2, autocast=split)
    weights, saved = (copy.deepcopy(part.state_dict()) for part in (run.model, run.optimizer))
    for values in saved["state"].values():
        assert set(values) == STATE[rule] | {"step"} | ({"master_residual"} if split else set())
    other = train(begin(rule, tiny_llama(DTYPES[dtype], seed=9), **settings), 1, autocast=split)
    other.model.load_state_dict(weights)
    other.optimizer.load_state_dict(saved)
    for each in (run, other):
        each.losses, each.norms = [], []
        train(each, 2, seed=8, autocast=split)
    assert_same_bits(run, other)


def _trained_by_torch(**hyperparameters) -> tuple[torch.nn.Module, torch.optim.SGD]:
    model = tiny_llama(torch.float32, num_hidden_layers=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **hyperparameters)
    _step_plainly(model, optimizer)
    return model, optimizer


def _step_plainly(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tokens = torch.arange(32).view(2, 16) % 96
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    "hyperparameters", [{}, {"momentum": 0.9, "dampening": 0.5}], ids=["plain", "momentum"]
)
def test_state_of_torchs_sgd_goes_on_here_and_ours_there(hyperparameters):
    model, theirs = _trained_by_torch(**hyperparameters)
    run = prepare(
        tiny_llama(torch.float32, num_hidden_layers=3), bf16=False, optimizer=SlideSGD, **hyperparameters
    )
    ours = SlideSGD(run.model.parameters(), lr=1.0, **hyperparameters)
    run.engine.attach_optimizer(ours)
    run.model.load_state_dict(model.state_dict())
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert ours.param_groups[0]["lr"] == 0.1
    again = tiny_llama(torch.float32, num_hidden_layers=3)
    back = torch.optim.SGD(again.parameters(), lr=1.0, **hyperparameters)
    run.engine.synchronize()
    again.load_state_dict(run.model.state_dict())
    back.load_state_dict(copy.deepcopy(ours.state_dict()))
    for stepped in ((run.model, ours), (model, theirs), (again, back)):
        _step_plainly(*stepped)
    run.engine.synchronize()
    expected = dict(model.named_parameters())
    for name, param in again.named_parameters():
        torch.testing.assert_close(param, expected[name], rtol=0, atol=0)
    for state in run.engine.states:
        torch.testing.assert_close(state.read_master(), expected[state.name].data, rtol=0, atol=1e-6)


def _saved_by(kind: type[torch.optim.Optimizer], **hyperparameters) -> dict:
    """State after a step, of an optimizer of torch or of ours in an engine, over one group."""
    model = tiny_llama(torch.float32, num_hidden_layers=3)
    if optimizer_class(kind) is kind:
        run = prepare(model, bf16=False, optimizer=kind, **hyperparameters)
        optimizer = kind(model.parameters(), lr=1e-3, **hyperparameters)
        run.engine.attach_optimizer(optimizer)
    else:
        optimizer = kind(model.parameters(), lr=1e-3, **hyperparameters)
    _step_plainly(model, optimizer)
    return copy.deepcopy(optimizer.state_dict())


MOMENTUM = {"momentum": 0.9}
STRANGERS = {
    "AdamW's into Lion": ((torch.optim.AdamW, {}), (SlideLion, {}), "exp_avg_sq, which is not Lion's"),
    "Lion's into AdamW": ((SlideLion, {}), (SlideAdamW, {}), "no 'eps': they are not those of AdamW"),
    "AdamW's into SGD": ((torch.optim.AdamW, {}), (SlideSGD, {}), "no 'momentum': they are not those of SGD"),
    "SGD's into Lion": ((SlideSGD, {}), (SlideLion, {}), "no 'betas': they are not those of Lion"),
    "SGD's into AdamW": ((torch.optim.SGD, MOMENTUM), (SlideAdamW, {}), "not those of AdamW"),
    "torch's momentum into none": (
        (torch.optim.SGD, MOMENTUM),
        (SlideSGD, {}),
        r"SGD \(momentum_buffer\), this one SGD \(no state\)",
    ),
    "momentum into none": ((SlideSGD, MOMENTUM), (SlideSGD, {}), r"this one SGD \(no state\)"),
    "none of torch's into momentum": (
        (torch.optim.SGD, {}),
        (SlideSGD, MOMENTUM),
        r"SGD \(no state\), this one SGD \(momentum_buffer\)",
    ),
    "none into momentum": ((SlideSGD, {}), (SlideSGD, MOMENTUM), r"is SGD \(no state\)"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_state_of_another_optimizer_is_refused_and_changes_nothing(name):
    (theirs, given), (kind, hyperparameters), message = STRANGERS[name]
    saved = _saved_by(theirs, **given)
    model = tiny_llama(torch.float32, num_hidden_layers=3)
    run = prepare(model, bf16=False, optimizer=kind, **hyperparameters)
    ours = kind(model.parameters(), lr=0.5, **hyperparameters)
    run.engine.attach_optimizer(ours)
    _step_plainly(model, ours)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(CheckpointError, match=message):
        ours.load_state_dict(saved)
    after = ours.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, values in before["state"].items():
        assert_same_state(after["state"][index], values)
    _step_plainly(model, ours)


def test_state_with_options_that_are_not_here_is_refused():
    saved = _trained_by_torch(maximize=True)[1].state_dict()
    run = begin("sgd", tiny_llama(torch.float32, num_hidden_layers=3), bf16=False)
    ours = SlideSGD(run.model.parameters(), lr=0.5)
    run.engine.attach_optimizer(ours)
    with pytest.raises(UnsupportedModelError, match="maximize=True is not supported"):
        ours.load_state_dict(saved)
    assert ours.param_groups[0]["lr"] == 0.5


# -- groups --------------------------------------------------------------------------------------------------


def test_momentum_that_comes_later_is_refused_before_a_step():
    run = train(begin("sgd"), 1)
    before = all_tensors(run.engine)
    run.optimizer.param_groups[0]["momentum"] = 0.9
    tokens = torch.arange(32).view(2, 16)
    for _ in range(2):  # and again: nothing is half done
        run.model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        with pytest.raises(StateError, match=r"momentum=0\.9, but the model was prepared for SGD without"):
            run.optimizer.step()
        run.optimizer.zero_grad()
    for name, tensors in all_tensors(run.engine).items():
        assert_same_state(tensors, before[name], name)
    run.optimizer.param_groups[0]["momentum"] = 0.0
    train(run, 1)


def test_group_with_momentum_is_not_added_to_sgd_without():
    model = tiny_llama(num_hidden_layers=3)
    last = [model.lm_head.weight]
    run = prepare(model, optimizer=SlideSGD)
    optimizer = SlideSGD([p for p in model.parameters() if p is not last[0]], lr=0.1)
    run.engine.attach_optimizer(optimizer)
    with pytest.raises(StateError, match=r"momentum=0\.9"):
        optimizer.add_param_group({"params": last, "momentum": 0.9})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": last, "lr": 0.2})
    train(run, 1, max_norm=None)


def test_engine_for_another_rule_takes_no_optimizer():
    run = begin("lion")
    with pytest.raises(
        StateError, match=r"optimizer=Lion \(exp_avg\) and is now wanted with SGD \(no state\)"
    ):
        run.engine.attach_optimizer(SlideSGD(run.model.parameters()))


# -- values --------------------------------------------------------------------------------------------------

BAD = {
    "negative momentum": (SlideSGD, {"momentum": -0.5}, r"momentum must be finite and >= 0, got -0\.5"),
    "momentum that is no number": (SlideSGD, {"momentum": float("nan")}, "got nan"),
    "dampening": (SlideSGD, {"dampening": float("inf")}, "dampening must be finite, got inf"),
    "nesterov": (SlideSGD, {"nesterov": True}, r"got momentum=0\.0 and dampening=0\.0"),
    "dampened nesterov": (
        SlideSGD,
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        r"dampening=0\.1",
    ),
    "decay": (SlideSGD, {"weight_decay": -1.0}, r"weight_decay must be >= 0, got -1\.0"),
    "lr": (SlideLion, {"lr": -1.0}, r"lr must be >= 0, got -1\.0"),
    "betas": (SlideLion, {"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), got \(0\.9, 1\.0\)"),
    "Lion's decay": (SlideLion, {"weight_decay": -1.0}, "weight_decay must be >= 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_hyperparameters_outside_their_range(name):
    kind, given, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        kind([torch.nn.Parameter(torch.zeros(2))], **given)


@pytest.mark.parametrize("kind", [SlideLion, SlideSGD])
def test_8bit_state_is_adamws(kind):
    with pytest.raises(ConfigError, match=f"optimizer_states='8bit' is for AdamW; {kind.rule_name}"):
        kind.rule_for([{}], "8bit")


def test_rules_have_names_and_formats_of_their_own():
    rules = [kind.rule_for([given], "fp32") for kind, given in (*RULES.values(), (SlideAdamW, {}))]
    assert [rule.name for rule in rules] == ["Lion", "SGD", "SGD", "SGD", "AdamW"]
    assert rules[2] == rules[3], "nesterov is a number of a step, not another rule"
    assert len({rule.format.name for rule in rules}) == 4
    for kind in OPTIMIZERS:
        assert kind.rule_for([{}], "fp32").name == kind.rule_name
