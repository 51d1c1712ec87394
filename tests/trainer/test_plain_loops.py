"""What a training loop of one's own may do between backward and step: the same numbers as without streaming.

Every test runs one function over a plain loop and over a streamed one, in fp32, and compares the weights.
"""

import pytest
import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.lr_scheduler import LambdaLR

from hf_slideformer import SlideAccelerator, SlideConfig
from hf_slideformer.engine.engine import SlideEngine, engine_of
from hf_slideformer.engine.model.setup import Setup
from hf_slideformer.errors import StateError

from . import runs

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


def assert_same_as_plain(body, **slide_options):
    """`body(loop)` leaves the same weights, and returns the same numbers, with and without streaming."""
    plain, ours = runs.plain_loop(), runs.slide_loop(**slide_options)
    expected, actual = body(plain), body(ours)
    if expected is not None:
        torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=1e-5, atol=1e-7)
    runs.assert_same_weights(ours.weights(), plain.weights())
    return plain, ours


def _step(loop, max_norm=0.3):
    norm = loop.clip(loop.model.parameters(), max_norm).item()
    loop.optimizer.step()
    loop.optimizer.zero_grad()
    return norm


@pytest.mark.parametrize("discard", ["optimizer", "model", "in_place"])
def test_step_skipped_after_clipping(discard):
    # The coefficient of the gradients that were thrown away must not reach the next ones.
    def body(loop):
        norms = []
        for index, tokens in enumerate(runs.batches(4)):
            loop.loss(tokens).backward()
            if index == 1:
                loop.clip(loop.model.parameters(), 0.01)
                if discard == "model":
                    loop.model.zero_grad()
                else:
                    loop.optimizer.zero_grad(set_to_none=discard == "optimizer")
            else:
                norms.append(_step(loop))
        return norms

    assert_same_as_plain(body)


def test_step_skipped_after_a_nan_norm():
    def body(loop):
        for index, tokens in enumerate(runs.batches(4)):
            loss = loop.loss(tokens)
            (loss * float("nan") if index == 1 else loss).backward()
            if torch.isfinite(loop.clip(loop.model.parameters(), 0.3)):
                loop.optimizer.step()
            loop.optimizer.zero_grad()

    plain, _ = assert_same_as_plain(body)
    assert all(torch.isfinite(weight).all() for weight in plain.weights().values())


def test_backward_after_clipping():
    # What was clipped stays clipped, what comes after is added whole.
    def body(loop):
        for first, second in zip(runs.batches(2), runs.batches(2, seed=9), strict=True):
            loop.loss(first).backward()
            loop.clip(loop.model.parameters(), 0.3)
            loop.loss(second).backward()
            loop.optimizer.step()
            loop.optimizer.zero_grad()

    assert_same_as_plain(body)


def test_clipping_twice():
    def body(loop):
        norms = []
        for tokens in runs.batches(2):
            loop.loss(tokens).backward()
            norms.append(loop.clip(loop.model.parameters(), 0.5).item())
            norms.append(_step(loop, 0.25))
        return norms

    assert_same_as_plain(body)


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("edit", ["in_place", "replaced"])
@pytest.mark.parametrize("when", ["between_micro_batches", "before_clipping"])
def test_gradients_edited_by_hand(when, edit, accumulates):
    def scale(loop):
        for param in loop.model.parameters():
            if edit == "in_place":
                param.grad.mul_(0.125)
            else:
                param.grad = param.grad * 0.125

    def body(loop):
        norms = []
        for first, second in zip(runs.batches(2), runs.batches(2, seed=9), strict=True):
            loop.loss(first).backward()
            if when == "between_micro_batches":
                scale(loop)
            loop.loss(second).backward()
            if when == "before_clipping":
                scale(loop)
            norms.append(_step(loop))
        return norms

    assert_same_as_plain(body, accumulates=accumulates)


def test_gradients_replaced_after_one_backward():
    def body(loop):
        norms = []
        for tokens in runs.batches(3):
            loop.loss(tokens).backward()
            for param in loop.model.parameters():
                param.grad = param.grad * 0.125
            norms.append(_step(loop, 0.05))
        return norms

    assert_same_as_plain(body)


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("order", ["before_forward", "after_forward"])
def test_penalty_on_the_parameters_themselves(order, accumulates):
    # Its gradient reaches `p.grad` past the units (L2-SP, EWC and other penalties on weights).
    def body(loop):
        def penalty():
            return 0.1 * sum(param.pow(2).sum() for param in loop.model.parameters())

        norms = []
        for tokens in runs.batches(3):
            if order == "before_forward":
                if loop.engine is not None:
                    loop.engine.synchronize()  # weights are read by hand
                loss = penalty()
                loss = loss + loop.loss(tokens)
            else:
                loss = loop.loss(tokens)
                loss = loss + penalty()
            loss.backward()
            norms.append(_step(loop))
        return norms

    assert_same_as_plain(body, accumulates=accumulates)


@pytest.mark.parametrize("how", ["norm", "infinity_norm", "value", "one_layer"])
def test_torchs_own_clipping(how):
    clips = {
        "norm": lambda model: clip_grad_norm_(model.parameters(), 0.3),
        "infinity_norm": lambda model: clip_grad_norm_(model.parameters(), 0.01, norm_type=float("inf")),
        "value": lambda model: clip_grad_value_(model.parameters(), 0.002),
        "one_layer": lambda model: clip_grad_norm_(model.model.layers[1].parameters(), 0.01),
    }

    def body(loop):
        norms = []
        for tokens in runs.batches(3):
            loop.loss(tokens).backward()
            clips[how](loop.model)
            norms.append(loop.clip(loop.model.parameters(), 1e9).item())
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        return norms

    assert_same_as_plain(body)


def test_engines_clipping_of_some_parameters():
    def body(loop):
        norms = []
        for tokens in runs.batches(3):
            loop.loss(tokens).backward()
            loop.clip(loop.model.parameters(), 0.5)
            norms.append(loop.clip(loop.model.model.layers[1].parameters(), 0.01).item())
            loop.clip(loop.model.parameters(), 0.1, float("inf"))
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        return norms

    assert_same_as_plain(body)


def test_zero_grad_between_backward_and_step():
    def body(loop):
        first, second = runs.batches(2)
        loop.loss(first).backward()
        loop.model.zero_grad()
        loop.loss(second).backward()
        norm = _step(loop)
        loop.optimizer.step()  # nothing is pending: nothing moves, no decay, no step is counted
        return [norm]

    assert_same_as_plain(body)


@pytest.mark.parametrize("accumulates", [False, True])
def test_zeroing_gradients_in_place_while_updates_run(accumulates):
    def body(loop):
        for tokens in runs.batches(3):
            loop.loss(tokens).backward()
            loop.optimizer.step()
            loop.optimizer.zero_grad(set_to_none=False)
            for param in loop.model.parameters():
                if param.grad is not None:
                    param.grad.zero_()

    assert_same_as_plain(body, accumulates=accumulates, delays={"update": runs.slow(0.01)})


def test_gradients_kept_over_steps_are_refused():
    # torch would add the next gradients to these; here step() uses up those of streamed layers.
    loop = runs.slide_loop()
    first, second = runs.batches(2)
    loop.loss(first).backward()
    loop.optimizer.step()
    loss = loop.loss(second)  # zero_grad() may still come between forward and backward
    with pytest.raises(StateError, match="zero_grad"):
        loss.backward()


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zeroing_gradients_between_forward_and_backward(accumulates, set_to_none):
    def body(loop):
        for first, second in zip(runs.batches(3), runs.batches(3, seed=5), strict=True):
            loss = loop.loss(first)
            loop.optimizer.zero_grad(set_to_none=set_to_none)
            loss.backward()
            if accumulates:
                loop.loss(second).backward()
            loop.optimizer.step()

    assert_same_as_plain(body, accumulates=accumulates)


def test_model_zero_grad_between_forward_and_backward_after_a_clip():
    def body(loop):
        for tokens in runs.batches(3):
            loss = loop.loss(tokens)
            loop.model.zero_grad()
            loss.backward()
            loop.clip(loop.model.parameters(), 0.1)
            loop.optimizer.step()

    assert_same_as_plain(body)


def test_parameters_without_a_gradient_are_skipped():
    # Neither decay nor a step count, as in torch.
    def body(loop):
        for index, tokens in enumerate(runs.batches(3)):
            loop.loss(tokens).backward()
            if index == 1:
                for param in loop.model.model.layers[2].parameters():
                    param.grad = None
            loop.optimizer.step()
            loop.optimizer.zero_grad()

    _, ours = assert_same_as_plain(body)
    steps = {state.name: state.step for state in ours.engine.states}
    assert steps["model.layers.2.mlp.up_proj.weight"] == 2
    assert steps["model.layers.1.mlp.up_proj.weight"] == 3


def test_group_added_after_preparation():
    plain, ours = runs.plain_loop(runs.llama()), runs.slide_loop(runs.llama())
    for loop in (plain, ours):
        # The last layer's matrix starts outside the optimizer, as in gradual unfreezing.
        late = loop.model.model.layers[3].mlp.down_proj.weight
        for group in loop.optimizer.param_groups:
            group["params"] = [param for param in group["params"] if param is not late]
    ours = _reattached(ours)
    for loop in (plain, ours):
        first, second = runs.batches(2)
        loop.loss(first).backward()
        loop.optimizer.step()
        loop.model.zero_grad()
        late = loop.model.model.layers[3].mlp.down_proj.weight
        loop.optimizer.add_param_group({"params": [late], "weight_decay": 0.1})
        loop.loss(second).backward()
        loop.optimizer.step()
    runs.assert_same_weights(ours.weights(), plain.weights())


def _reattached(loop):
    """A fresh engine for an optimizer whose groups were changed before."""
    optimizer = type(loop.optimizer)(
        [
            {"params": group["params"], "weight_decay": group["weight_decay"]}
            for group in loop.optimizer.param_groups
        ],
        lr=1e-3,
    )
    model = runs.llama()
    names = {id(param): name for name, param in loop.model.named_parameters()}
    for group in optimizer.param_groups:
        group["params"] = [model.get_parameter(names[id(param)]) for param in group["params"]]
    engine = SlideEngine(
        model, Setup(device=torch.device("cpu"), bf16=False, config=SlideConfig(update="deferred"))
    )
    engine.attach_optimizer(optimizer)
    return runs.Loop(model, optimizer, engine.clip_grad_norm_, engine)


# -- weights written from outside ----------------------------------------------------------------------------


def test_a_write_under_no_grad_is_seen_by_the_next_forward():
    def body(loop):
        losses = []
        for tokens in runs.batches(3):
            losses.append(loop.loss(tokens).item())  # the units are on the device now
            with torch.no_grad():
                loop.model.model.layers[1].mlp.up_proj.weight.copy_(torch.full((48, 32), 0.01))
                loop.model.model.norm.weight.mul_(0.5)
            loss = loop.loss(tokens)
            losses.append(loss.item())
            loss.backward()
            _step(loop)
        return losses

    assert_same_as_plain(body)


def _near_ties(shape):
    """fp32 values of which half lie exactly between two bf16 neighbours, where torch's cast rounds to even."""
    values = torch.randn(shape)
    bits = values.view(torch.int32)
    bits.view(-1)[::2] &= -65536
    bits.view(-1)[::2] |= 0x8000
    return values


@pytest.mark.parametrize("part", ["model", "model.model", "model.model.layers.1", "model.lm_head"])
def test_fp32_weights_load_exactly_into_split_masters(part):
    loop = runs.slide_loop(bf16=True)
    torch.manual_seed(3)
    module = loop.model.get_submodule(part.removeprefix("model").removeprefix("."))
    given = {name: _near_ties(tensor.shape) for name, tensor in module.state_dict().items()}
    names = {id(param): name for name, param in module.named_parameters()}
    module.load_state_dict(given)
    loaded = {
        names[id(state.param)]: state.read_master()
        for state in loop.engine.states
        if id(state.param) in names
    }
    runs.assert_same_weights(loaded, given, atol=0)


def test_bf16_weights_loaded_clear_the_residual():
    loop = runs.slide_loop(bf16=True)
    loop.loss(runs.batches(1)[0]).backward()
    loop.optimizer.step()
    given = {name: tensor.bfloat16() for name, tensor in runs.llama(seed=1).state_dict().items()}
    loop.model.load_state_dict(given)
    expected = {name: tensor.float() for name, tensor in given.items()}
    runs.assert_same_weights(loop.weights(), expected, atol=0)


def test_loading_waits_for_pending_updates():
    loop = runs.slide_loop(delays={"update": runs.slow(0.02)})
    loop.loss(runs.batches(1)[0]).backward()
    loop.optimizer.step()
    given = runs.llama(seed=1).state_dict()
    loop.model.load_state_dict(given)
    runs.assert_same_weights(loop.weights(), given, atol=0)


# -- optimizers and accelerators -----------------------------------------------------------------------------


def test_scheduler_of_the_users_own_adamw():
    """`prepare` adopts the optimizer; the scheduler made for it keeps driving the learning rate."""

    def train(loop, optimizer, accelerator=None):
        schedule = LambdaLR(optimizer, lambda step: 1.0 / (step + 1))
        if accelerator is not None:
            loop.model, loop.optimizer = accelerator.prepare(loop.model, optimizer)
        for tokens in runs.batches(3):
            loop.loss(tokens).backward()
            loop.optimizer.step()
            schedule.step()
            loop.optimizer.zero_grad()
        return schedule.get_last_lr()

    plain, ours = runs.plain_loop(), runs.plain_loop()
    expected = train(plain, plain.optimizer)
    assert train(ours, ours.optimizer, SlideAccelerator(cpu=True)) == expected
    assert expected == [pytest.approx(1e-3 / 4)] * 2
    ours.engine = engine_of(ours.model)
    runs.assert_same_weights(ours.weights(), plain.weights())


def test_a_second_optimizer_starts_afresh():
    def body(loop):
        for tokens in runs.batches(2):
            loop.loss(tokens).backward()
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        loop.optimizer = type(loop.optimizer)(loop.model.parameters(), lr=3e-4, weight_decay=0.2)
        if loop.engine is not None:
            loop.engine.attach_optimizer(loop.optimizer)
        for tokens in runs.batches(2, seed=9):
            loop.loss(tokens).backward()
            _step(loop)

    assert_same_as_plain(body, delays={"update": runs.slow(0.01)})


def test_state_of_torchs_adamw_loads():
    plain, ours = runs.plain_loop(), runs.slide_loop()
    first, second = runs.batches(2)
    plain.loss(first).backward()
    plain.optimizer.step()
    plain.optimizer.zero_grad()
    ours.model.load_state_dict(plain.model.state_dict())
    ours.optimizer.load_state_dict(plain.optimizer.state_dict())
    for loop in (plain, ours):
        loop.loss(second).backward()
        loop.optimizer.step()
    runs.assert_same_weights(ours.weights(), plain.weights(), atol=1e-6)
    # and back: torch's AdamW takes the state that is written here
    plain.optimizer.load_state_dict(ours.optimizer.state_dict())
    for state in plain.optimizer.state.values():
        assert state["step"] == 2 and state["exp_avg"].dtype == torch.float32


def test_two_models_in_one_accelerator():
    accelerator = SlideAccelerator(cpu=True)
    plain = [runs.plain_loop(runs.llama(seed=seed)) for seed in (0, 1)]
    ours = [runs.plain_loop(runs.llama(seed=seed)) for seed in (0, 1)]
    for loop in ours:
        loop.model, loop.optimizer = accelerator.prepare(loop.model, loop.optimizer)
        loop.clip, loop.engine = accelerator.clip_grad_norm_, engine_of(loop.model)
    norms = []
    for pair in (plain, ours):
        norms.append([])
        for tokens in runs.batches(2):
            for loop in pair:
                loop.loss(tokens).backward()
                norms[-1].append(_step(loop))
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    for one, two in zip(ours, plain, strict=True):
        runs.assert_same_weights(one.weights(), two.weights())


def test_two_engines_interleaved_give_the_bits_of_each_alone():
    def steps(loop):
        for tokens in runs.batches(3):
            loss = loop.loss(tokens)
            yield
            loss.backward()
            yield
            _step(loop)
            yield

    def loops():
        return [
            runs.slide_loop(runs.llama(seed=0), delays={"update": runs.slow(0.003)}),
            runs.slide_loop(runs.llama(torch.bfloat16, seed=1), bf16=True, accumulates=True),
        ]

    alone, together = loops(), loops()
    for loop in alone:
        for _ in steps(loop):
            pass
    for _ in zip(*map(steps, together), strict=True):
        pass
    for one, two in zip(alone, together, strict=True):
        runs.assert_same_weights(two.weights(), one.weights(), atol=0)


# -- numbers that are none -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_bad_gradient(name, clipped, bad):
    def body(loop):
        norms = []
        for index, tokens in enumerate(runs.batches(2)):
            loop.loss(tokens).backward()
            if index == 0:
                loop.model.get_parameter(name).grad[3, 5] = bad
            norms.append(loop.clip(loop.model.parameters(), 0.3 if clipped else float("inf")).item())
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        return norms

    plain, ours = runs.plain_loop(), runs.slide_loop()
    expected, actual = body(plain), body(ours)
    torch.testing.assert_close(
        torch.tensor(actual), torch.tensor(expected), rtol=1e-5, atol=0, equal_nan=True
    )
    assert any(torch.isnan(weight).any() for weight in plain.weights().values())
    runs.assert_same_weights(ours.weights(), plain.weights())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weight(bad):
    def body(loop):
        with torch.no_grad():
            loop.model.model.layers[2].mlp.up_proj.weight[3, 5] = bad
        losses = []
        for tokens in runs.batches(2):
            loss = loop.loss(tokens)
            losses.append(loss.item())
            loss.backward()
            losses.append(_step(loop))
        return losses

    plain, ours = runs.plain_loop(), runs.slide_loop()
    expected, actual = body(plain), body(ours)
    torch.testing.assert_close(
        torch.tensor(actual), torch.tensor(expected), rtol=1e-5, atol=0, equal_nan=True
    )
    runs.assert_same_weights(ours.weights(), plain.weights())


def test_bad_weight_stays_one_in_a_split_master():
    # CUDA's NaN, 0x7FFFFFFF, would become -0.0 if it were rounded as a number.
    loop = runs.slide_loop(bf16=True)
    given = {name: tensor.float().clone() for name, tensor in loop.model.state_dict().items()}
    name = "model.layers.0.mlp.up_proj.weight"
    given[name].view(torch.int32)[0, 0] = 0x7FFFFFFF
    given[name][0, 1], given[name][0, 2] = float("inf"), float("-inf")
    loop.model.load_state_dict(given)
    master = loop.weights()[name]
    assert torch.isnan(master[0, 0])
    assert master[0, 1:3].tolist() == [float("inf"), float("-inf")]
    assert torch.isnan(loop.loss(runs.batches(1)[0]))
