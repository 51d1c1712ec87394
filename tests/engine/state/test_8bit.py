"""8-bit moments: the bits of a plain loop wherever they live, in blocks that belong to one parameter each.

The plain loop calls the kernels' reference on whole parameters that have tensors of their own. In the engine's
buffers everything between parameters is NaN here, so whatever reads across a parameter's end shows.
"""

import copy
import math

import pytest
import torch
from slideformer_kernels import MOMENT_BLOCK_NUMEL, reference
from slideformer_kernels.scalars import adamw_scalars

from hf_slideformer import SlideAdamW, SlideConfig
from hf_slideformer.config import _CHOICES
from hf_slideformer.engine.model.setup import Setup
from hf_slideformer.errors import CheckpointError, StateError
from hf_slideformer.memory import staging
from hf_slideformer.memory.buffers import HostBuffer
from hf_slideformer.memory.layout import (
    ALIGN_ELEMENTS,
    EIGHT_BIT_MOMENTS,
    FP32_MOMENTS,
    MOMENT_FORMATS,
    ParamSpec,
    lay_out,
)
from hf_slideformer.memory.unit_memory import UnitMemory
from hf_slideformer.optim.adamw import AdamWHyperparams, AdamWRule
from hf_slideformer.optim.state import ParamState, plan_runs
from tests.engine.loop import (
    Run,
    assert_same_bits,
    assert_same_state,
    batches,
    decide,
    prepare,
    tensors_of,
    tiny_llama,
    train,
)

LR, DECAY = 1e-3, 0.1  # those of `prepare`
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# One layer more than there are slots. In the second shape no parameter's numel is a multiple of a block, and vectors
# that are not decayed lie between matrices.
SHAPES = {
    "even": {"num_hidden_layers": 4},
    "odd": {
        "num_hidden_layers": 4,
        "vocab_size": 97,
        "hidden_size": 24,
        "intermediate_size": 27,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "attention_bias": True,
    },
}


def config(states: str = "8bit", **settings) -> SlideConfig:
    return SlideConfig(optimizer_states=states, **settings)


class PoisonedBuffer(HostBuffer):
    """Memory that begins as NaN, in bf16 and in fp32."""

    def __init__(self, nbytes, *, pin=False):
        super().__init__(nbytes, pin=pin)
        self.tensor(torch.uint8, 0, self.nbytes).fill_(0xFF)


@pytest.fixture
def prepare_poisoned(monkeypatch):
    """As `prepare`, with NaN (or the largest codes) wherever no parameter lies in the buffers of units."""
    monkeypatch.setattr(staging, "HostBuffer", PoisonedBuffer)

    def prepare_(*args, **kwargs) -> Run:
        run = prepare(*args, **kwargs)
        with torch.no_grad():
            for unit in run.engine.executor.units:
                if not unit.streams:
                    continue
                kept = [
                    (t, t.clone()) for state in unit.states for t in tensors_of(state).values() if t.numel()
                ]
                for buffer in unit.group.home.memory.buffers():
                    buffer.tensor(torch.uint8, 0, buffer.nbytes).fill_(0xFF)
                for tensor, value in kept:
                    tensor.copy_(value)
        return run

    return prepare_


# -- the plain loop ------------------------------------------------------------------------------------------


class Plain:
    """The state of one parameter in tensors of its own; `update` is the reference on all of it."""

    def __init__(self, weight: torch.Tensor, *, decayed: bool):
        self.tensors = {"weight": weight}
        if weight.dtype == torch.bfloat16:
            self.tensors["residual"] = torch.zeros(weight.shape, dtype=torch.int16)
        blocks = math.ceil(weight.numel() / 128)
        self.tensors |= {
            "exp_avg": torch.zeros(weight.shape, dtype=torch.int8),
            "exp_avg_scale": torch.zeros(blocks),
            "exp_avg_sq": torch.zeros(weight.shape, dtype=torch.uint8),
            "exp_avg_sq_scale": torch.zeros(blocks),
        }
        self.weight_decay = DECAY if decayed else 0.0
        self.step = 0

    def update(self, grad: torch.Tensor, grad_scale: float = 1.0) -> None:
        self.step += 1
        scalars = adamw_scalars(
            lr=LR, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=self.weight_decay, step=self.step
        )
        moments = {name: tensor for name, tensor in self.tensors.items() if name.startswith("exp_avg")}
        masters = [tensor for name, tensor in self.tensors.items() if name not in moments]
        reference.adamw_(masters, grad, moments, scalars, grad_scale)


def train_plainly(
    model: torch.nn.Module, steps: int, *, max_norm: float | None, micro_batches: int, autocast: bool
) -> tuple[list[float], list[float], dict[str, Plain]]:
    """`loop.train` without an engine: losses, norms, and the state of every parameter."""
    params = dict(model.named_parameters())
    plain = {name: Plain(param.data, decayed=param.dim() > 1) for name, param in params.items()}
    if micro_batches > 1:
        for param in params.values():
            param.grad_dtype = torch.float32
    losses, norms = [], []
    data = iter(batches(steps * micro_batches, vocab=model.config.vocab_size))
    model.train()
    for _ in range(steps):
        losses.append(0.0)
        for _ in range(micro_batches):
            tokens = next(data)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss / micro_batches
            loss.backward()
            losses[-1] += loss.item()
        coefficient = 1.0
        if max_norm is not None:
            norm = math.sqrt(sum(reference.sum_of_squares(param.grad) for param in params.values()))
            norms.append(torch.tensor(norm, dtype=torch.float32).item())
            coefficient = torch.tensor(min(1.0, max_norm / (norm + 1e-6)), dtype=torch.float32).item()
        for name, param in params.items():
            plain[name].update(param.grad, coefficient)
            param.grad = None
    return losses, norms, plain


MODES = {
    "clipped": {},
    "accumulated": {"accumulates": True},
    "overlapped": {"config": config(update="overlapped")},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_a_plain_loop(prepare_poisoned, dtype, mode, shape):
    bf16 = dtype == "bf16"
    how = {
        "max_norm": None if mode == "overlapped" else 0.5,
        "micro_batches": 2 if mode == "accumulated" else 1,
        "autocast": bf16,
    }
    losses, norms, plain = train_plainly(tiny_llama(DTYPES[dtype], **SHAPES[shape]), 5, **how)
    assert all(norm > 0.5 for norm in norms), "the test must clip"
    settings = {"bf16": bf16, "config": config()} | MODES[mode]
    for resident in ((), (1,), range(4)):
        run = prepare_poisoned(
            tiny_llama(DTYPES[dtype], **SHAPES[shape]),
            decisions=decide(resident=resident, keep=resident, units=4),
            **settings,
        )
        train(run, 5, **how)
        assert (run.losses, run.norms) == (losses, norms), resident
        for state in run.engine.states:
            assert_same_state(tensors_of(state), plain[state.name].tensors, state.name)


def give_gradients(run: Run, grads: dict[str, torch.Tensor]) -> None:
    """One step on gradients that are set by hand."""
    for state in run.engine.states:
        if state.name in grads:
            state.param.grad = grads[state.name].clone()
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.engine.synchronize()


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_without_a_gradient_leave_their_neighbours_right(prepare_poisoned, dtype):
    """Which neighbours one kernel call takes changes from step to step, and so do their step counts."""
    model = tiny_llama(DTYPES[dtype], **SHAPES["odd"])
    model.model.layers[0].mlp.gate_proj.weight.requires_grad_(False)
    plain = {
        name: Plain(param.detach().clone(), decayed=param.dim() > 1)
        for name, param in model.named_parameters()
    }
    run = prepare_poisoned(model, bf16=dtype == "bf16", config=config())
    generator = torch.Generator().manual_seed(5)
    for _ in range(6):
        grads = {}
        for state in run.engine.states:
            if state.spec.trainable and torch.rand((), generator=generator) < 0.7:
                scale = 10.0 ** torch.randint(-6, 3, state.spec.shape, generator=generator)
                grad = scale * torch.randn(state.spec.shape, generator=generator)
                grads[state.name] = grad.to(state.spec.dtype)
                plain[state.name].update(grads[state.name])
        give_gradients(run, grads)
    assert len({state.step for state in run.engine.states}) > 2
    for state in run.engine.states:
        if state.spec.trainable:
            assert_same_state(tensors_of(state), plain[state.name].tensors, state.name)
        else:
            assert not state.moments
            assert torch.equal(state.weight, plain[state.name].tensors["weight"])


def test_a_gradient_that_is_not_finite_poisons_its_block_only(prepare_poisoned):
    run = prepare_poisoned(tiny_llama(**SHAPES["even"]), config=config())
    name = "model.layers.1.mlp.up_proj.weight"
    grads = {state.name: torch.ones_like(state.weight) for state in run.engine.states}
    bad = {**grads, name: grads[name].clone()}
    bad[name].view(-1)[300] = math.inf
    give_gradients(run, bad)
    give_gradients(run, grads)
    for state in run.engine.states:
        (hit,) = state.weight.reshape(-1).isnan().nonzero(as_tuple=True)
        assert hit.tolist() == (list(range(256, 384)) if state.name == name else []), state.name


def test_a_second_optimizer_starts_with_fresh_moments():
    run = train(prepare(tiny_llama(**SHAPES["odd"]), config=config()), 2)
    run.engine.attach_optimizer(SlideAdamW(run.model.parameters(), lr=LR))
    for state in run.engine.states:
        assert not any(tensor.any() for tensor in state.moments.values()), state.name


@pytest.mark.gpu
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_streamed_equals_resident_on_gpu(micro_batches, deterministic):
    shape = {"hidden_size": 1000, "intermediate_size": 2800, "num_attention_heads": 10, "vocab_size": 4096}
    shape |= {"num_key_value_heads": 5, "attention_bias": True}
    runs = [
        train(
            prepare(
                tiny_llama(**shape),
                device="cuda",
                config=config(),
                accumulates=micro_batches > 1,
                decisions=decide(resident=units, keep=units),
                lr=1e-4,
            ),
            10,
            micro_batches=micro_batches,
            max_norm=0.5,
            batch=4,
            seq=512,
        )
        for units in ((), range(6), (0, 3, 5))
    ]
    assert min(runs[0].norms) > 0.5, "the test must clip"
    assert_same_bits(runs[0], runs[1])
    assert_same_bits(runs[0], runs[2])


# -- formats and runs ----------------------------------------------------------------------------------------


def test_formats():
    assert tuple(MOMENT_FORMATS) == _CHOICES["optimizer_states"]
    # A parameter starts at a multiple of one, so it starts with a block of its own.
    assert ALIGN_ELEMENTS % MOMENT_BLOCK_NUMEL == 0
    assert EIGHT_BIT_MOMENTS.nbytes(1280) == 2 * 1280 + 2 * 10 * 4
    assert EIGHT_BIT_MOMENTS.nbytes(129) == 2 * 129 + 2 * 2 * 4  # the last block is short
    assert FP32_MOMENTS.nbytes(129) == 8 * 129
    assert [format_.elementwise for format_ in (FP32_MOMENTS, EIGHT_BIT_MOMENTS)] == [True, False]


RUNS = {
    "fp32": [["a", "b", "c", "d", "e"], ["f"]],
    # b and c end inside a block, and what follows them there is padding.
    "8bit": [["a", "b"], ["c"], ["d", "e"], ["f"]],
}


@pytest.mark.parametrize("name", RUNS)
def test_neighbours_join_only_where_padding_does_no_harm(name):
    sizes = {"a": 128, "b": 200, "c": 64, "d": 256, "e": 128, "f": 128}
    layout = lay_out(
        [ParamSpec(key, (numel,), torch.bfloat16, torch.bfloat16, True, True) for key, numel in sizes.items()]
    )
    memory = UnitMemory(layout, HostBuffer(layout.weight_bytes), HostBuffer(2 * layout.lo_numel))
    memory.use_moments({part: HostBuffer(4096) for part in MOMENT_FORMATS[name].parts})
    states = [
        ParamState(
            index,
            torch.nn.Parameter(torch.empty(0)),
            0,
            True,
            segment,
            memory.weight(segment),
            memory.residual(segment),
            memory.moments(segment),
            step=1,
            rule=AdamWRule(MOMENT_FORMATS[name]),
        )
        for index, segment in enumerate(layout.segments)
    ]
    runs = plan_runs(
        states,
        lambda state: AdamWHyperparams(2e-3 if state.name == "f" else 1e-3, 0.9, 0.999, 1e-8, 0.0),
        lambda state: 1.0,
    )
    assert [[state.name for state in run.members] for run in runs] == RUNS[name]


# -- memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", MOMENT_FORMATS)
def test_the_plan_counts_what_is_allocated(states):
    shape = {"hidden_size": 264, "intermediate_size": 1000, "num_hidden_layers": 2, "vocab_size": 97}
    run = prepare(tiny_llama(**shape), config=config(states, update="overlapped"))
    plan = run.engine.plan
    items = {item.what: item.nbytes for item in plan.items}
    planned = items["weights"] + items["master residuals"] + items["moments"]
    buffers = [buffer for unit in run.engine.executor.units for buffer in unit.group.home.memory.buffers()]
    assert planned <= run.engine.host_state_bytes < planned + 4096 * len(buffers)
    expected = {"fp32": 12.0, "8bit": 6.0625}[states]
    assert run.engine.host_state_bytes / plan.host_params == pytest.approx(expected, rel=0.005)
    resident = [state for state in run.engine.states if not state.streams]
    assert any(state.spec.numel % MOMENT_BLOCK_NUMEL for state in resident)
    assert items["resident moments"] == sum(
        tensor.nbytes for state in resident for tensor in state.moments.values()
    )
    assert plan.moments == states
    assert ("8-bit moments" in str(plan)) == (states == "8bit")
    assert any("8-bit moments" in note for note in plan.as_dict()["notes"]) == (states == "8bit")


# -- what it does to training --------------------------------------------------------------------------------


def _learn(states: str) -> list[float]:
    """Losses of 60 steps on sequences in which each token determines the next."""
    run = prepare(tiny_llama(), config=config(states), lr=LR)
    generator = torch.Generator().manual_seed(3)
    losses = []
    run.model.train()
    for _ in range(60):
        tokens = [torch.randint(96, (4,), generator=generator)]
        for _ in range(15):
            tokens.append((5 * tokens[-1] + 17) % 96)
        batch = torch.stack(tokens, dim=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = run.model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        run.engine.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad()
    run.engine.synchronize()
    return losses


def test_losses_stay_close_to_those_of_fp32_moments():
    exact, rounded = _learn("fp32"), _learn("8bit")
    assert exact != rounded
    assert sum(exact[-10:]) / 10 < 0.65 * exact[0], "the test must learn"
    # Over three seeds the largest difference was 0.006, of losses that fall from 4.6 to 2.4.
    assert max(abs(one - two) for one, two in zip(exact, rounded, strict=True)) < 0.03


# -- state dict ----------------------------------------------------------------------------------------------


def _trained(states: str, dtype: str = "bf16", steps: int = 3, **overrides) -> Run:
    model = tiny_llama(DTYPES[dtype], **SHAPES["odd"], **overrides)
    bf16 = dtype == "bf16"
    return train(prepare(model, bf16=bf16, config=config(states)), steps, autocast=bf16)


def _moments(state_dict: dict, index: int) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state_dict["state"][index].items() if key.startswith("exp_avg")}


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_dict_holds_what_is_stored(dtype):
    run = _trained("8bit", dtype)
    saved = run.optimizer.state_dict()
    params = [param for group in run.optimizer.param_groups for param in group["params"]]
    assert len(saved["state"]) == len(params)
    for index, param in enumerate(params):
        values, state = saved["state"][index], run.engine.param_state(param)
        assert ("master_residual" in values) == (dtype == "bf16")
        assert {key: (value.dtype, value.shape) for key, value in _moments(saved, index).items()} == {
            "exp_avg": (torch.int8, param.shape),
            "exp_avg_scale": (torch.float32, (math.ceil(param.numel() / 128),)),
            "exp_avg_sq": (torch.uint8, param.shape),
            "exp_avg_sq_scale": (torch.float32, (math.ceil(param.numel() / 128),)),
        }
        for key, value in _moments(saved, index).items():
            assert value.data_ptr() == state.moments[key].data_ptr(), "no copies of the state"
            assert value.untyped_storage().nbytes() == value.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_8bit_state_loads_bit_for_bit(dtype):
    run = _trained("8bit", dtype)
    weights = copy.deepcopy(run.model.state_dict())
    saved = copy.deepcopy(run.optimizer.state_dict())
    other = _trained("8bit", dtype, steps=1, seed=9)  # with other moments in place
    other.model.load_state_dict(weights)
    other.optimizer.load_state_dict(saved)
    for each in (run, other):
        each.losses, each.norms = [], []
        train(each, 3, seed=8, autocast=dtype == "bf16")
    assert_same_bits(run, other)


CONVERSIONS = {
    ("fp32", "8bit"): reference.quantize_moments,
    ("8bit", "fp32"): reference.dequantize_moments,
}


@pytest.mark.parametrize(("source", "target"), CONVERSIONS)
def test_the_other_format_is_converted(source, target):
    run = _trained(source)
    saved = copy.deepcopy(run.optimizer.state_dict())
    other = _trained(target, steps=1, seed=9)
    other.model.load_state_dict(run.model.state_dict())
    other.optimizer.load_state_dict(saved)
    loaded = other.optimizer.state_dict()
    for index in saved["state"]:
        moments = _moments(saved, index)
        expected = CONVERSIONS[source, target](*moments.values())
        assert_same_state(
            _moments(loaded, index),
            dict(zip([part.name for part in MOMENT_FORMATS[target].parts], expected, strict=True)),
        )
        assert loaded["state"][index]["step"] == 3
        assert torch.equal(
            loaded["state"][index]["master_residual"], saved["state"][index]["master_residual"]
        )
    # And it trains on from there, close to where the source goes.
    for each in (run, other):
        each.losses, each.norms = [], []
        train(each, 3, seed=8)
    assert other.losses == pytest.approx(run.losses, rel=2e-3)


def test_8bit_state_survives_a_detour_over_fp32():
    run = _trained("8bit")
    saved = copy.deepcopy(run.optimizer.state_dict())
    wide, back = _trained("fp32", steps=0), _trained("8bit", steps=0)
    wide.optimizer.load_state_dict(saved)
    back.optimizer.load_state_dict(wide.optimizer.state_dict())
    for index in saved["state"]:
        assert_same_state(_moments(back.optimizer.state_dict(), index), _moments(saved, index))


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_of_torchs_adamw_is_quantized(dtype):
    model = tiny_llama(DTYPES[dtype], **SHAPES["odd"])
    theirs = torch.optim.AdamW(model.parameters(), lr=LR)
    model(input_ids=batches(1)[0], labels=batches(1)[0], use_cache=False).loss.backward()
    theirs.step()
    run = prepare(tiny_llama(DTYPES[dtype], **SHAPES["odd"]), bf16=dtype == "bf16", config=config())
    ours = SlideAdamW(run.model.parameters(), lr=LR)
    run.engine.attach_optimizer(ours)
    ours.load_state_dict(theirs.state_dict())
    loaded = ours.state_dict()
    for index, values in theirs.state_dict()["state"].items():
        moments = [values[key].float() for key in ("exp_avg", "exp_avg_sq")]
        for actual, expected in zip(
            _moments(loaded, index).values(), reference.quantize_moments(*moments), strict=True
        ):
            assert torch.equal(actual, expected)
        assert loaded["state"][index]["step"] == 1


def _drop(*keys):
    return lambda values: [values.pop(key) for key in keys]


def _cut(key):
    return lambda values: values.update({key: values[key][:-1]})


def _cast(key, dtype):
    return lambda values: values.update({key: values[key].to(dtype)})


BROKEN = {
    "codes": (_cut("exp_avg"), r"saved exp_avg has shape \(23, 24\).* wants \(24, 24\)"),
    "scales": (_cut("exp_avg_scale"), r"saved exp_avg_scale has shape \(4,\).* wants \(5,\)"),
    "a scale is missing": (_drop("exp_avg_sq_scale"), r"saved exp_avg_sq_scale has no tensor.* \(5,\)"),
    "no scales": (
        _drop("exp_avg_scale", "exp_avg_sq_scale"),
        r"saved exp_avg has dtype torch\.int8, wanted torch\.float32",
    ),
    "another optimizer's codes": (
        _cast("exp_avg", torch.uint8),
        r"saved exp_avg has dtype torch\.uint8, wanted torch\.int8",
    ),
    "no moments": (_drop("exp_avg", "exp_avg_scale"), r"saved exp_avg has no tensor"),
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("target", MOMENT_FORMATS)
def test_state_that_does_not_fit_is_refused_and_changes_nothing(target, broken):
    breaks, message = BROKEN[broken]
    saved = copy.deepcopy(_trained("8bit").optimizer.state_dict())
    run = _trained(target, steps=1, seed=9)
    index = 8  # the second layer's first matrix; those before it are whole
    assert saved["state"][index]["exp_avg"].shape == (24, 24)
    breaks(saved["state"][index])
    before = copy.deepcopy(run.optimizer.state_dict())
    with pytest.raises(CheckpointError, match=rf"model\.layers\.1\.self_attn\.q_proj\.weight: {message}"):
        run.optimizer.load_state_dict(saved)
    after = run.optimizer.state_dict()
    for key in before["state"]:
        assert_same_state(after["state"][key], before["state"][key])


def test_state_of_a_parameter_that_is_frozen_now_is_refused():
    saved = _trained("8bit").optimizer.state_dict()
    model = tiny_llama(**SHAPES["odd"])
    groups = [[p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False)]
    model.lm_head.weight.requires_grad_(False)
    run = prepare(model, config=config())
    optimizer = SlideAdamW([{"params": group} for group in groups])  # the frozen one too, as torch allows
    run.engine.attach_optimizer(optimizer)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: .* frozen"):
        optimizer.load_state_dict(saved)


def test_another_format_on_a_prepared_model_is_refused():
    run = prepare(tiny_llama(), config=config())
    with pytest.raises(StateError, match="optimizer_states=8bit and is now wanted with fp32"):
        run.engine.check_setup(
            Setup(
                device=run.engine.device,
                bf16=True,
                config=SlideConfig(),
                micro_batches=1,
                overlap_is_exact=False,
            )
        )
