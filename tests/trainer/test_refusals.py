"""Bad input gets one clear error, with the way out, before anything is moved."""

import contextlib
import types

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer

from hf_slideformer import SlideAdamW, SlideConfig, SlideTrainer
from hf_slideformer.accelerator import check_environment
from hf_slideformer.engine.engine import SlideEngine, engine_of
from hf_slideformer.engine.model.setup import Setup
from hf_slideformer.errors import (
    ConfigError,
    PlanError,
    StateError,
    UnsupportedModelError,
)
from tests.engine.loop import decide

from . import runs


@contextlib.contextmanager
def refused(model, error, *fragments):
    """The body raises `error`, whose message holds all `fragments`, and leaves `model` as it was."""
    before = {name: (id(param), param.data_ptr()) for name, param in model.named_parameters()}
    with pytest.raises(error) as caught:
        yield
    assert type(caught.value) is error
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert {name: (id(param), param.data_ptr()) for name, param in model.named_parameters()} == before
    assert engine_of(model) is None
    assert not any("forward" in vars(module) for module in model.modules())


def bad_arguments(output_dir, **values):
    """Training arguments with values that `TrainingArguments` itself may refuse on this machine."""
    args = runs.arguments(output_dir)
    for name, value in values.items():
        setattr(args, name, value)
    return args


ARGUMENTS = {
    "fp16": ({"fp16": True}, "use bf16=True"),
    "fp16_full_eval": ({"fp16_full_eval": True}, "use bf16=True"),
    "bf16_full_eval": ({"bf16_full_eval": True}, "use bf16=True"),
    "torch_compile": ({"torch_compile": True}, "set it to False"),
    "adafactor": ({"optim": "adafactor"}, "'adamw_torch'"),
    "8bit_optimizer": ({"optim": "adamw_bnb_8bit"}, "'adamw_torch'"),
    "deepspeed": ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "remove deepspeed="),
    "fsdp": ({"fsdp": "full_shard"}, "remove"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(tmp_path, name):
    values, remedy = ARGUMENTS[name]
    model = runs.llama()
    with refused(model, UnsupportedModelError, next(iter(values)).split("_")[0], remedy):
        SlideTrainer(model=model, args=bad_arguments(tmp_path, **values), train_dataset=runs.Tokens())


OPTIMIZERS = {
    "rmsprop": (lambda params: torch.optim.RMSprop(params), "RMSprop", "use torch.optim.AdamW"),
    "adam": (lambda params: torch.optim.Adam(params), "Adam", "use torch.optim.AdamW"),
    "amsgrad": (lambda params: torch.optim.AdamW(params, amsgrad=True), "amsgrad", "leave it off"),
    "maximize": (lambda params: torch.optim.AdamW(params, maximize=True), "maximize", "leave it off"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_objects(tmp_path, name):
    make, what, remedy = OPTIMIZERS[name]
    model = runs.llama()
    with refused(model, UnsupportedModelError, what, remedy):
        runs.make(
            SlideTrainer, model, tmp_path, trainer_kwargs={"optimizers": (make(model.parameters()), None)}
        )


def test_optimizer_that_has_made_steps(tmp_path):
    model = runs.llama()
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=runs.batches(1)[0], labels=runs.batches(1)[0]).loss.backward()
    optimizer.step()
    with refused(model, UnsupportedModelError, "already made steps", "load its state_dict"):
        runs.make(SlideTrainer, model, tmp_path, trainer_kwargs={"optimizers": (optimizer, None)})


OPTIMIZER_CLASSES = {
    "rmsprop": ((torch.optim.RMSprop, {}), "RMSprop", "use torch.optim.AdamW"),
    "maximize": ((torch.optim.SGD, {"maximize": True}), "maximize", "leave it off"),
    "amsgrad": ((torch.optim.AdamW, {"amsgrad": True}), "amsgrad", "leave it off"),
}


@pytest.mark.parametrize("name", OPTIMIZER_CLASSES)
def test_optimizer_classes(tmp_path, name):
    given, what, remedy = OPTIMIZER_CLASSES[name]
    model = runs.llama()
    with refused(model, UnsupportedModelError, what, remedy):
        runs.make(SlideTrainer, model, tmp_path, trainer_kwargs={"optimizer_cls_and_kwargs": given})


def test_harmless_optimizer_options_are_taken(tmp_path):
    options = {"lr": 1e-3, "fused": True, "foreach": False, "amsgrad": False, "maximize": False}
    trainer = runs.make(
        SlideTrainer,
        runs.llama(),
        tmp_path,
        trainer_kwargs={"optimizer_cls_and_kwargs": (torch.optim.AdamW, options)},
    )
    assert trainer.create_optimizer().param_groups[0]["lr"] == 1e-3


def test_output_attentions(tmp_path):
    model = runs.llama(attn_implementation="eager")
    model.config.output_attentions = True
    with refused(model, UnsupportedModelError, "model.config.output_attentions = False"):
        runs.make(SlideTrainer, model, tmp_path)


def test_model_without_layers(tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, input_ids, labels=None):
            return self.blocks[0](input_ids.float())

    model = Plain()
    with refused(model, UnsupportedModelError, "Plain", "blocks", "use plain Trainer"):
        runs.make(SlideTrainer, model, tmp_path)


def test_data_parallel_model(tmp_path):
    model = runs.llama()
    with refused(model, UnsupportedModelError, "DataParallel", "pass the model itself"):
        runs.make(SlideTrainer, nn.DataParallel(model), tmp_path)


def test_meta_weights(tmp_path):
    model = runs.llama()
    model.lm_head.to("meta")
    with refused(model, UnsupportedModelError, "lm_head.weight", "load the model's weights"):
        runs.make(SlideTrainer, model, tmp_path)


def test_fp16_weights(tmp_path):
    model = runs.llama(torch.float16)
    with refused(model, UnsupportedModelError, "float16", "dtype=torch.bfloat16"):
        runs.make(SlideTrainer, model, tmp_path)


BUDGETS = {
    "cpu_memory": ("1MiB", "moments", "RAM", "1.00 MiB may be used", "cpu_memory"),
    "gpu_memory": ("0.5MiB", "inputs of units", "GPU", "0.50 MiB may be used", "gpu_memory"),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_budgets(tmp_path, name):
    size, *fragments = BUDGETS[name]
    model = runs.llama(hidden_size=128)
    with refused(model, PlanError, "The plan needs", *fragments):
        runs.make(SlideTrainer, model, tmp_path, trainer_kwargs={"slide_config": {name: size}})


def test_unwritable_output_directory(tmp_path):
    # Below a regular file, since tests may run as a user who may write anywhere.
    (tmp_path / "file").write_text("")
    model = runs.llama()
    with refused(model, ConfigError, "output_dir", str(tmp_path / "file"), "writable directory"):
        runs.make(SlideTrainer, model, tmp_path / "file" / "out")


SETTINGS = {
    "unknown": ({"gpu_memroy": "24GiB"}, "'gpu_memroy'", "did you mean 'gpu_memory'"),
    "choice": ({"placement": "everywhere"}, "'everywhere'", "'stream'"),
    "states": ({"optimizer_states": "4bit"}, "'4bit'", "'fp32', '8bit'"),
    "activations": ({"activations": "drop"}, "'drop'", "'keep', 'recompute', 'offload'"),
    "seq_len": ({"seq_len": 0}, "seq_len must be a positive integer", "got 0"),
    "vertical": ({"accumulation": "vertical"}, "not available yet", "accumulation='horizontal'"),
    "nvme": ({"nvme_memory": "1TB"}, "there is no nvme_dir", "name a directory"),
    "overlapped_clipping": ({"update": "overlapped"}, "max_grad_norm=1.0", "use update='auto'"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(tmp_path, name):
    config, *fragments = SETTINGS[name]
    model = runs.llama()
    with refused(model, ConfigError, *fragments):
        runs.make(SlideTrainer, model, tmp_path, trainer_kwargs={"slide_config": config})


def test_overlapped_updates_with_accumulation(tmp_path):
    model = runs.llama()
    with refused(model, ConfigError, "gradient_accumulation_steps=1", "use update='auto'"):
        runs.make(
            SlideTrainer,
            model,
            tmp_path,
            trainer_kwargs={"slide_config": SlideConfig(update="overlapped")},
            max_grad_norm=0,
            gradient_accumulation_steps=2,
        )


def test_several_gpus_become_one(tmp_path):
    args = bad_arguments(tmp_path, _n_gpu=4)
    trainer = SlideTrainer(model=runs.llama(), args=args, train_dataset=runs.Tokens())
    assert args.n_gpu == 1
    assert args.train_batch_size == trainer._train_batch_size == 2
    trainer.train()
    assert not any(isinstance(module, nn.DataParallel) for module in trainer.model_wrapped.modules())


LAUNCHES = {
    "deepspeed": ({"distributed_type": DistributedType.DEEPSPEED}, "DeepSpeed, FSDP or Megatron-LM"),
    "fsdp": ({"distributed_type": DistributedType.FSDP}, "remove their configuration"),
    "processes": ({"num_processes": 2}, "--num_processes 1"),
    "fp16": ({"mixed_precision": "fp16"}, "use bf16=True"),
    "fp8": ({"mixed_precision": "fp8"}, "use bf16=True"),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launch_modes(name):
    # An accelerator in these modes cannot be made in one process without their libraries.
    values, remedy = LAUNCHES[name]
    accelerator = types.SimpleNamespace(
        distributed_type=DistributedType.NO,
        num_processes=1,
        mixed_precision="no",
        state=types.SimpleNamespace(deepspeed_plugin=None, fsdp_plugin=None),
    )
    check_environment(accelerator)
    for key, value in values.items():
        setattr(accelerator, key, value)
    with pytest.raises(UnsupportedModelError, match=remedy):
        check_environment(accelerator)


# -- after preparation ---------------------------------------------------------------------------------------


def test_requires_grad_of_a_streamed_parameter_changed():
    loop = runs.slide_loop()
    loop.model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    with pytest.raises(
        StateError, match=r"layers\.1\.mlp\.up_proj\.weight changed to False .* make a new trainer"
    ):
        loop.loss(runs.batches(1)[0])


def test_resident_parameter_unfrozen():
    model = runs.llama()
    model.lm_head.weight.requires_grad_(False)
    engine = SlideEngine(model, Setup(device=torch.device("cpu"), bf16=False, config=SlideConfig()))
    optimizer = SlideAdamW(model.parameters())  # the frozen one among them, as torch allows
    engine.attach_optimizer(optimizer)
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(StateError, match=r"lm_head\.weight changed to True"):
        _step(runs.Loop(model, optimizer, engine.clip_grad_norm_, engine))


def _step(loop):
    loop.loss(runs.batches(1)[0]).backward()
    loop.optimizer.step()
    loop.optimizer.zero_grad()


def test_model_cast_after_preparation():
    loop = runs.slide_loop(runs.llama(torch.bfloat16), bf16=True)
    loop.model.to(torch.float32)
    loop.loss(runs.batches(1)[0]).backward()  # an ordinary model, which nothing trains any more
    with pytest.raises(StateError, match=r"left the engine: it was cast or moved .* make a new optimizer"):
        loop.optimizer.step()


@pytest.mark.parametrize("name", ["model.layers.2.self_attn.q_proj.weight", "lm_head.weight"])
def test_data_replaced_after_preparation(name):
    # A resident one would otherwise go on being read here and updated where it was: it would silently stop training.
    loop = runs.slide_loop()
    param = loop.model.get_parameter(name)
    param.data = param.data.clone()
    with pytest.raises(StateError, match=rf"memory of {name} was replaced"):
        _step(loop)


@pytest.mark.parametrize("how", ["assigned", "loaded"])
def test_parameter_replaced_after_preparation(how):
    # Streaming puts the parameter that it knows back after every use: the new weights would silently be gone.
    loop = runs.slide_loop()
    if how == "assigned":
        projection = loop.model.model.layers[2].mlp.up_proj
        projection.weight = nn.Parameter(torch.zeros_like(projection.weight))
    else:
        loop.model.load_state_dict(runs.llama(seed=1).state_dict(), assign=True)
    with pytest.raises(StateError, match=r"layers\.\d\.[a-z_.]+weight was replaced"):
        loop.loss(runs.batches(1)[0])


def test_hooks_on_streamed_parameters(tmp_path):
    # The gradient reaches another tensor than the one that the hook is on, so it could never run.
    model = runs.llama()
    model.model.layers[0].mlp.up_proj.weight.register_hook(lambda grad: grad * 2)
    with refused(model, UnsupportedModelError, "layers.0.mlp.up_proj.weight", "hook"):
        runs.make(SlideTrainer, model, tmp_path)


def test_backward_without_an_optimizer():
    # And with one, the engine goes on: nothing of the refused backward is left.
    model, plain = runs.llama(), runs.plain_loop()
    engine = SlideEngine(model, Setup(device=torch.device("cpu"), bf16=False, config=SlideConfig()))
    first, second = runs.batches(2)
    for _ in range(2):
        loss = model(input_ids=first, labels=first).loss
        with pytest.raises(StateError, match=r"without an optimizer; prepare both.*trainer\.train"):
            loss.backward()
    assert all(param.grad is None for param in model.parameters())
    optimizer = SlideAdamW(runs.plain_loop(model).optimizer.param_groups, lr=1e-3)
    engine.attach_optimizer(optimizer)
    ours = runs.Loop(model, optimizer, engine.clip_grad_norm_, engine)
    for loop in (ours, plain):
        loop.loss(second).backward()
        loop.optimizer.step()
    runs.assert_same_weights(ours.weights(), plain.weights())


@pytest.mark.parametrize("decided", ["streamed", "resident"])
@pytest.mark.parametrize("trained", ["units", "outside", "all"])
def test_backward_without_an_optimizer_is_refused_wherever_parameters_are(decided, trained):
    model = runs.llama()
    units = {id(param) for param in model.model.layers.parameters()}
    for param in model.parameters():
        param.requires_grad_(trained == "all" or (id(param) in units) == (trained == "units"))
    everything = range(4) if decided == "resident" else ()
    engine = SlideEngine(
        model,
        Setup(device=torch.device("cpu"), bf16=False, config=SlideConfig()),
        decisions=decide(resident=everything, keep=everything, units=4),
    )
    assert [unit.streams for unit in engine.executor.units] == [decided == "streamed"] * 4
    loss = model(input_ids=runs.batches(1)[0], labels=runs.batches(1)[0]).loss
    with pytest.raises(StateError, match="without an optimizer"):
        loss.backward()


def test_double_backward():
    loop = runs.slide_loop()
    with pytest.raises(StateError, match=r"double backward .* use plain Trainer"):
        loop.loss(runs.batches(1)[0]).backward(create_graph=True)


@pytest.mark.parametrize("between", ["nothing", "zero_grad"])
def test_second_backward_through_one_graph(between):
    # retain_graph=True alone is harmless; only the second backward needs what is gone.
    loop, plain = runs.slide_loop(), runs.plain_loop()
    first, second = runs.batches(2)
    loss = loop.loss(first)
    loss.backward(retain_graph=True)
    if between == "zero_grad":
        loop.optimizer.zero_grad()
    with pytest.raises(StateError, match=r"backward ran twice .*\(retain_graph=True"):
        loss.backward()
    loop.optimizer.zero_grad()
    for run in (loop, plain):  # and the engine goes on
        run.loss(second).backward()
        run.optimizer.step()
    runs.assert_same_weights(loop.weights(), plain.weights())


def test_optimizer_of_another_model():
    model, other = runs.llama(), runs.llama()
    engine = SlideEngine(model, Setup(device=torch.device("cpu"), bf16=False, config=SlideConfig()))
    with pytest.raises(UnsupportedModelError, match="make the optimizer from the same model object"):
        engine.attach_optimizer(SlideAdamW(other.parameters()))


def test_optimizer_that_is_not_prepared():
    model = runs.llama()
    optimizer = SlideAdamW(model.parameters())
    with pytest.raises(StateError, match="prepare model and optimizer together"):
        optimizer.step()


# -- a loss that is not a number -----------------------------------------------------------------------------


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_loss_behaves_as_in_trainer(tmp_path, filtered, bad):
    def with_bad_loss(base):
        class BadLoss(base):
            calls = 0

            def compute_loss(self, *args, **kwargs):
                loss = super().compute_loss(*args, **kwargs)
                self.calls += 1
                return loss * bad if self.calls == 3 else loss

        return BadLoss

    trainers = [
        runs.make(
            with_bad_loss(base),
            runs.llama(),
            tmp_path,
            logging_nan_inf_filter=filtered,
            gradient_accumulation_steps=2,
            max_steps=3,
        )
        for base in (SlideTrainer, Trainer)
    ]
    for trainer in trainers:
        trainer.train()
    runs.assert_same_logs(*trainers)
    second = runs.logged(trainers[0])[1]["loss"]
    assert (second == second and abs(second) != float("inf")) == filtered
    ours, theirs = trainers
    runs.assert_same_weights(runs.masters(ours.model, ours.slide.engine), runs.masters(theirs.model))
    assert all(torch.isnan(param).any() for param in theirs.model.parameters()), "the loss must do harm"
