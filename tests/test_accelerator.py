"""`SlideAccelerator` by itself: where its settings come from, what it connects, keeps working and refuses."""

import gc
import weakref

import pytest
import torch
from accelerate import Accelerator, notebook_launcher
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import DistributedType, DynamoBackend
from accelerate.utils.deepspeed import DummyOptim

from hf_slideformer import SlideAccelerator, SlideConfig, SlideFormerPlugin
from hf_slideformer.accelerator import check_environment
from hf_slideformer.config import CONFIG_VARIABLE
from hf_slideformer.engine.engine import engine_of
from hf_slideformer.errors import (
    ConfigError,
    PlanError,
    StateError,
    UnsupportedModelError,
)
from tests.trainer import runs

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


def prepared(**options):
    loop = runs.plain_loop()
    model, _ = SlideAccelerator(cpu=True, **options).prepare(loop.model, loop.optimizer)
    return engine_of(model).config


@pytest.mark.parametrize("config", [SlideConfig(trace_steps=3), {"trace_steps": 3}])
def test_plugins_settings_reach_the_engine(config, monkeypatch):
    monkeypatch.setenv(CONFIG_VARIABLE, '{"trace_steps": 2}')
    assert prepared(slideformer_plugin=SlideFormerPlugin(config)).trace_steps == 3


def test_launchers_settings_reach_the_engine(monkeypatch):
    monkeypatch.setenv(CONFIG_VARIABLE, '{"trace_steps": 2}')
    assert prepared().trace_steps == 2
    assert prepared(slideformer_plugin=SlideFormerPlugin()).trace_steps == 2


def test_defaults(monkeypatch):
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    assert prepared() == SlideConfig()


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ('{"gpu_memry": 1}', "did you mean 'gpu_memory'")]
)
def test_launchers_settings_are_checked(text, message, monkeypatch):
    monkeypatch.setenv(CONFIG_VARIABLE, text)
    with pytest.raises(ConfigError, match=f"{CONFIG_VARIABLE}.*{message}|{message}.*"):
        SlideAccelerator(cpu=True)


def test_compilation_is_refused():
    with pytest.raises(UnsupportedModelError, match="dynamo_backend"):
        SlideAccelerator(cpu=True, dynamo_backend=DynamoBackend.EAGER)


@pytest.mark.parametrize(
    "kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM]
)
def test_other_placements_are_refused(kind):
    accelerator = SlideAccelerator(cpu=True)
    accelerator.state.distributed_type = kind
    with pytest.raises(UnsupportedModelError, match="Megatron-LM; remove"):
        check_environment(accelerator)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"])
def test_other_placements_that_a_launcher_asks_for_are_refused(variable, monkeypatch):
    accelerator = SlideAccelerator(cpu=True)
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UnsupportedModelError, match="Megatron-LM; remove"):
        check_environment(accelerator)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"fsdp_plugin": object()}, "fsdp_plugin; leave it out"),
        ({"parallelism_config": object()}, "parallelism_config"),
        ({"mixed_precision": "fp16"}, "'fp16' is not supported"),
        ({"mixed_precision": "fp8"}, "'fp8' is not supported"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else "",
)
def test_refused_when_made(asked, message):
    with pytest.raises(UnsupportedModelError, match=message):
        SlideAccelerator(cpu=True, **asked)


def test_precision_is_the_accelerators():
    assert SlideAccelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
    AcceleratorState._reset_state(reset_partial_state=True)
    loop = runs.plain_loop()
    accelerator = SlideAccelerator(cpu=True, mixed_precision="bf16")
    model, _ = accelerator.prepare(loop.model, loop.optimizer)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


# -- prepared together, or one after the other -------------------------------------------------------------------------

ORDERS = {
    "together": [("model", "optimizer", "scheduler")],
    "optimizer_before_model_together": [("optimizer", "scheduler", "model")],
    "model_first": [("model",), ("optimizer",), ("scheduler",)],
    "optimizer_first": [("optimizer",), ("model",), ("scheduler",)],
    "scheduler_with_optimizer": [("model",), ("optimizer", "scheduler")],
    "scheduler_before_model": [("optimizer", "scheduler"), ("model",)],
}


def train(accelerator, prepare, *, steps=3, accumulation=1, of_prepared=False):
    """Train a tiny llama; `prepare` gives model, optimizer and scheduler. The losses, and the weights at the end."""
    loop = runs.plain_loop()
    parts = {"model": loop.model, "optimizer": loop.optimizer}
    if not of_prepared:
        parts["scheduler"] = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda step: 1 / (1 + step))
    prepare(parts)
    if of_prepared:
        schedule = torch.optim.lr_scheduler.LambdaLR(parts["optimizer"], lambda step: 1 / (1 + step))
        parts["scheduler"] = accelerator.prepare(schedule)
    losses = []
    for tokens in runs.batches(steps * accumulation):
        with accelerator.accumulate(parts["model"]):
            loss = parts["model"](input_ids=tokens, labels=tokens, use_cache=False).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parts["model"].parameters(), 0.5)
            parts["optimizer"].step()
            parts["scheduler"].step()
            parts["optimizer"].zero_grad()
        losses.append(loss.item())
    rate = parts["scheduler"].get_last_lr()[0]
    return losses, rate, runs.masters(parts["model"], engine_of(parts["model"]))


def assert_same_training(ours, theirs):
    assert ours[1] == theirs[1]
    torch.testing.assert_close(torch.tensor(ours[0]), torch.tensor(theirs[0]), rtol=1e-5, atol=0)
    runs.assert_same_weights(ours[2], theirs[2])


@pytest.mark.parametrize("of_prepared", [False, True], ids=["", "scheduler_of_the_prepared_optimizer"])
@pytest.mark.parametrize("order", ORDERS)
def test_orders_of_preparation(order, of_prepared):
    def trained(accelerator):
        def prepare(parts):
            for names in ORDERS[order]:
                names = [name for name in names if name in parts]
                if names:
                    prepared = accelerator.prepare(*(parts[name] for name in names))
                    parts |= zip(names, prepared if len(names) > 1 else [prepared], strict=True)

        return train(accelerator, prepare, accumulation=2, of_prepared=of_prepared)

    ours = trained(SlideAccelerator(cpu=True, gradient_accumulation_steps=2))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert_same_training(ours, trained(Accelerator(cpu=True, gradient_accumulation_steps=2)))


def test_prepare_model_and_prepare_optimizer():
    def trained(accelerator):
        def prepare(parts):
            parts["model"] = accelerator.prepare_model(parts["model"])
            parts["optimizer"] = accelerator.prepare_optimizer(parts["optimizer"])
            parts["scheduler"] = accelerator.prepare_scheduler(parts["scheduler"])

        return train(accelerator, prepare)

    assert_same_training(trained(SlideAccelerator(cpu=True)), trained(Accelerator(cpu=True)))


def test_preparing_again_keeps_the_moments():
    accelerator = SlideAccelerator(cpu=True)
    loop = runs.plain_loop()
    model = accelerator.prepare(loop.model)
    optimizer = accelerator.prepare(loop.optimizer)
    tokens = runs.batches(1)[0]
    accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
    optimizer.step()
    accelerator.prepare(torch.optim.lr_scheduler.ConstantLR(optimizer))
    assert accelerator.prepare(model, optimizer) == (model, optimizer)
    states = optimizer.state_dict()["state"].values()
    assert states and all(state["step"] == 1 and state["exp_avg"].any() for state in states)


def test_optimizers_of_two_models():
    accelerator = SlideAccelerator(cpu=True)
    loops = [runs.plain_loop(runs.llama(seed=seed)) for seed in (0, 1)]
    optimizers = accelerator.prepare(loops[1].optimizer, loops[0].optimizer)
    accelerator.prepare(loops[0].model, loops[1].model)
    assert engine_of(loops[0].model)._updates.optimizer is optimizers[1].optimizer
    assert engine_of(loops[1].model)._updates.optimizer is optimizers[0].optimizer


def halves(model):
    params = list(model.parameters())
    return [torch.optim.AdamW(part) for part in (params[:4], params[4:])]


REFUSED = {
    "rmsprop": (lambda model: [torch.optim.RMSprop(model.parameters())], "RMSprop .* use torch.optim.AdamW"),
    "halves": (halves, "are in two optimizers; make one with a parameter group"),
    "twice": (lambda model: [torch.optim.AdamW(model.parameters()) for _ in "ab"], "are in two optimizers"),
    "more": (
        lambda model: [torch.optim.AdamW([*model.parameters(), torch.nn.Parameter(torch.ones(3))])],
        r"1 of the optimizer's 40 parameters, the first of shape \(3,\)",
    ),
}


def prepare(accelerator, model, optimizers, how):
    if how == "together":
        accelerator.prepare(model, *optimizers)
        return
    for part in (model, *optimizers) if how == "model_first" else (*optimizers, model):
        accelerator.prepare(part)


@pytest.mark.parametrize(
    ("case", "how"),
    [
        (case, how)
        for case in REFUSED
        for how in ("together", "model_first", "optimizer_first")
        # Then the second takes the place of the first, as when training starts anew.
        if (case, how) != ("twice", "model_first")
    ],
)
def test_optimizers_that_are_refused(case, how):
    make, message = REFUSED[case]
    model = runs.llama()
    places = [param.data_ptr() for param in model.parameters()]
    with pytest.raises(UnsupportedModelError, match=message):
        prepare(SlideAccelerator(cpu=True), model, make(model), how)
    if how != "model_first":
        assert engine_of(model) is None
        assert [param.data_ptr() for param in model.parameters()] == places


def test_optimizer_of_another_model_is_refused():
    model, other = runs.llama(), runs.plain_loop()
    with pytest.raises(UnsupportedModelError, match="holds no parameter of the LlamaForCausalLM"):
        SlideAccelerator(cpu=True).prepare(model, other.optimizer)
    assert engine_of(model) is None


@pytest.mark.parametrize("order", ["loader_first", "model_first"])
def test_plan_counts_on_batches_of_a_loader_that_is_prepared_before_the_model(order, caplog):
    accelerator = SlideAccelerator(cpu=True, slideformer_plugin=SlideFormerPlugin({"gpu_memory": "1GiB"}))
    loop = runs.plain_loop()
    loader = torch.utils.data.DataLoader(runs.Tokens(), batch_size=2)
    for part in (loader, loop.model) if order == "loader_first" else (loop.model, loader):
        accelerator.prepare(part)
    accelerator.prepare(loop.optimizer)
    assert engine_of(loop.model).plan.batch_size == (2 if order == "loader_first" else None)
    assert ("nothing is known of batches" in caplog.text) == (order == "model_first")


def test_what_stands_for_deepspeeds_optimizer_is_refused():
    model = runs.llama()
    with pytest.raises(UnsupportedModelError, match="DummyOptim stands for .* give a torch.optim.AdamW"):
        SlideAccelerator(cpu=True).prepare(model, DummyOptim(model.parameters()))
    assert engine_of(model) is None


# -- a model prepared alone --------------------------------------------------------------------------------------------


def test_model_alone_is_evaluated_and_not_trained():
    tokens = runs.batches(1)[0]
    expected = runs.llama()(input_ids=tokens, labels=tokens).loss
    accelerator = SlideAccelerator(cpu=True)
    model = accelerator.prepare(runs.llama())
    with torch.no_grad():
        assert model(input_ids=tokens, labels=tokens).loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss = model(input_ids=tokens, labels=tokens).loss
    with pytest.raises(StateError, match="without an optimizer; prepare both"):
        accelerator.backward(loss)


def test_model_alone_needs_no_room_for_training():
    plugin = SlideFormerPlugin({"cpu_memory": "700KiB"})
    accelerator = SlideAccelerator(cpu=True, slideformer_plugin=plugin)
    loop = runs.plain_loop(runs.llama(hidden_size=64))
    model = accelerator.prepare(loop.model)
    tokens = runs.batches(1)[0]
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=tokens, labels=tokens).loss)
    with pytest.raises(PlanError, match="The plan needs"):
        accelerator.prepare(loop.optimizer)


# -- what Accelerate offers besides ------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["deferred", "overlapped"])
def test_clip_grad_value(update):
    def trained(accelerator):
        loop = runs.plain_loop()
        model, optimizer = accelerator.prepare(loop.model, loop.optimizer)
        for tokens in runs.batches(3):
            accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
            accelerator.clip_grad_value_(model.parameters(), 1e-3)
            optimizer.step()
            optimizer.zero_grad()
        return runs.masters(model, engine_of(model))

    ours = SlideAccelerator(cpu=True, slideformer_plugin=SlideFormerPlugin({"update": update}))
    if update == "overlapped":
        with pytest.raises(StateError, match=r"clip_grad_value_.*update='deferred'"):
            trained(ours)
    else:
        runs.assert_same_weights(trained(ours), trained(Accelerator(cpu=True)))


class ListTracker(GeneralTracker):
    """Keeps what it is given; `requires_logging_directory` as for trackers that write no files."""

    name = "list"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self):
        super().__init__()
        self.calls = []

    @property
    def tracker(self):
        return self.calls

    @on_main_process
    def store_init_configuration(self, values):
        self.calls.append(("config", values))

    @on_main_process
    def log(self, values, step=None, **kwargs):
        self.calls.append(("log", values, step, kwargs))

    @on_main_process
    def finish(self):
        self.calls.append(("finish",))


def test_trackers():
    def tracked(accelerator_class):
        tracker = ListTracker()
        accelerator = accelerator_class(cpu=True, log_with=tracker)
        accelerator.init_trackers("project", config={"lr": 1e-3})
        assert accelerator.get_tracker("list") is tracker
        assert accelerator.get_tracker("list", unwrap=True) is tracker.calls
        loop = runs.plain_loop()
        model, optimizer = accelerator.prepare(loop.model, loop.optimizer)
        for step, tokens in enumerate(runs.batches(2)):
            loss = model(input_ids=tokens, labels=tokens).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            values = {"loss": round(loss.item(), 5)}
            accelerator.log(values, step=step, log_kwargs={"list": {"kept": True}})
        accelerator.end_training()
        return tracker.calls

    calls = tracked(SlideAccelerator)
    assert calls == tracked(Accelerator)
    assert [call[0] for call in calls] == ["config", "log", "log", "finish"]


def test_end_of_training_raises_what_an_update_raised(monkeypatch):
    tracker = ListTracker()
    accelerator = SlideAccelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("project")
    loop = runs.plain_loop()
    accelerator.prepare(loop.model, loop.optimizer)

    def fail():
        raise StateError("an update failed")

    monkeypatch.setattr(engine_of(loop.model), "synchronize", fail)
    with pytest.raises(StateError, match="an update failed"):
        accelerator.end_training()
    assert tracker.calls[-1] == ("finish",)


def test_autocast_is_accelerates():
    accelerator = SlideAccelerator(cpu=True, mixed_precision="bf16")
    loop = runs.plain_loop()
    accelerator.prepare(loop.model, loop.optimizer)
    with accelerator.autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16


def test_free_memory_lets_go_of_the_engine():
    accelerator = SlideAccelerator(cpu=True)
    loop = runs.plain_loop()
    model, optimizer = accelerator.prepare(loop.model, loop.optimizer)
    engine = weakref.ref(engine_of(model))
    del loop
    model, optimizer = accelerator.free_memory(model, optimizer)
    gc.collect()
    assert model is None and optimizer is None
    assert engine() is None
    assert (accelerator._models, accelerator._optimizers) == ([], [])
    second = runs.plain_loop()
    accelerator.prepare(second.model, second.optimizer)
    assert engine_of(second.model)._updates.optimizer is not None


def test_plan_after_free_memory_counts_on_the_batches_of_the_next_loader():
    """As `find_executable_batch_size` needs it, which tries one size after the other."""
    accelerator = SlideAccelerator(cpu=True, slideformer_plugin=SlideFormerPlugin({"gpu_memory": "1GiB"}))
    for batch_size in (4, 2):
        accelerator.free_memory()
        loop = runs.plain_loop()
        loader = torch.utils.data.DataLoader(runs.Tokens(), batch_size=batch_size)
        accelerator.prepare(loop.model, loop.optimizer, loader)
        assert engine_of(loop.model).plan.batch_size == batch_size


def test_free_memory_keeps_a_shape_that_was_configured():
    accelerator = SlideAccelerator(cpu=True, slideformer_plugin=SlideFormerPlugin({"gpu_memory": "1GiB"}))
    accelerator.count_on_batches(runs.Tokens(), 4, None)
    accelerator.free_memory()  # as Trainer does first
    loop = runs.plain_loop()
    accelerator.prepare(torch.utils.data.DataLoader(runs.Tokens(), batch_size=2))
    accelerator.prepare(loop.model, loop.optimizer)
    assert engine_of(loop.model).plan.batch_size == 4


def test_notebook_launcher():
    trained = []

    def in_a_notebook(steps):
        accelerator = SlideAccelerator(cpu=True)
        loop = runs.plain_loop()
        model, optimizer = accelerator.prepare(loop.model, loop.optimizer)
        for tokens in runs.batches(steps):
            accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
            optimizer.step()
            optimizer.zero_grad()
        trained.append(engine_of(model).metrics.totals())

    notebook_launcher(in_a_notebook, (2,), num_processes=1)
    assert trained[0]["h2d_bytes"] > 0
