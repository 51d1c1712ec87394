"""Trainer's SGD and Lion: against plain Trainer and the published formula, resumed, and refused where state differs."""

import copy
import functools
import importlib.util
import json

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from transformers import Trainer

from hf_slideformer import SlideAccelerator, SlideAdamW, SlideConfig, SlideLion, SlideSGD, SlideTrainer
from hf_slideformer.engine.engine import engine_of
from hf_slideformer.errors import CheckpointError, ConfigError, StateError, UnsupportedModelError
from tests.engine.loop import bits

from . import runs

SGD = {"lr": 0.1, "momentum": 0.9}


def groups(model, **of_vectors):
    """Matrices that decay, and vectors with hyperparameters of their own."""
    params = [param for param in model.parameters() if param.requires_grad]
    return [
        {"params": [param for param in params if param.dim() > 1], "weight_decay": 0.1},
        {"params": [param for param in params if param.dim() <= 1], **of_vectors},
    ]


def train_both(tmp_path, *, make=None, **settings):
    """A plain trainer and ours, trained alike; `make` gives optimizer and scheduler for a model."""
    trainers = []
    for kind in (Trainer, SlideTrainer):
        model = runs.llama()
        given = {} if make is None else {"trainer_kwargs": {"optimizers": make(model)}}
        trainers.append(runs.make(kind, model, tmp_path, **given, **settings))
        trainers[-1].train()
    return trainers


def assert_alike(plain, slide, *, atol=1e-5):
    runs.assert_same_logs(slide, plain)
    runs.assert_same_weights(
        runs.masters(slide.model, slide.slide.engine), runs.masters(plain.model), atol=atol
    )
    assert len({entry["loss"] for entry in runs.logged(slide)}) > 2, "the test must train"


# -- SGD -----------------------------------------------------------------------------------------------------

BY_ARGUMENTS = {
    "plain": {},
    "decay, schedule, accumulation": {
        "weight_decay": 0.3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 1,
        "gradient_accumulation_steps": 2,
    },
    "overlapped": {"max_grad_norm": 0.0},
}


@pytest.mark.parametrize("name", BY_ARGUMENTS)
def test_sgd_by_arguments(tmp_path, name):
    plain, slide = train_both(tmp_path, optim="sgd", learning_rate=0.1, **BY_ARGUMENTS[name])
    assert_alike(plain, slide)
    assert slide.slide.plan.moments == "sgd"


BY_OBJECT = {
    "momentum": lambda model: torch.optim.SGD(groups(model), **SGD),
    "dampening": lambda model: torch.optim.SGD(groups(model), **SGD, dampening=0.4, foreach=True),
    "nesterov": lambda model: torch.optim.SGD(groups(model), **SGD, nesterov=True),
    # As torch has it, nesterov does nothing where there is no momentum.
    "groups": lambda model: torch.optim.SGD(groups(model, momentum=0.0, lr=0.02), **SGD, nesterov=True),
    "groups of different momentum": lambda model: torch.optim.SGD(
        groups(model, momentum=0.5, dampening=0.2, weight_decay=0.0), **SGD
    ),
}


@pytest.mark.parametrize("name", BY_OBJECT)
def test_sgd_by_object(tmp_path, name):
    def make(model):
        optimizer = BY_OBJECT[name](model)
        return optimizer, LambdaLR(optimizer, lambda step: 1.0 / (1 + step))

    plain, slide = train_both(tmp_path, make=make)
    assert_alike(plain, slide)
    assert slide.slide.plan.moments == "sgd-momentum"


def test_momentum_that_a_schedule_moves(tmp_path):
    def make(model):
        optimizer = torch.optim.SGD(model.parameters(), **SGD)
        return optimizer, OneCycleLR(optimizer, max_lr=0.1, total_steps=5)

    plain, slide = train_both(tmp_path, make=make)
    assert_alike(plain, slide)
    assert slide.optimizer.param_groups[0]["momentum"] != SGD["momentum"]


def test_momentum_of_optim_args(tmp_path):
    # Older versions of Trainer do not read them for SGD.
    given = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {**SGD, "nesterov": True, "fused": False})}
    plain = runs.make(Trainer, runs.llama(), tmp_path, trainer_kwargs=given)
    by_class = runs.make(SlideTrainer, runs.llama(), tmp_path, trainer_kwargs=given)
    by_arguments = runs.make(
        SlideTrainer,
        runs.llama(),
        tmp_path,
        optim="sgd",
        optim_args="momentum=0.9, nesterov=True",
        learning_rate=0.1,
    )
    plain.train()
    for slide in (by_class, by_arguments):
        slide.train()
        assert_alike(plain, slide)


@pytest.mark.parametrize("order", ["together", "model first", "model first, evaluated"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, SlideSGD])
@pytest.mark.usefixtures("fresh_accelerate_state")
def test_sgd_in_a_loop(kind, order):
    plain, model = runs.llama(), runs.llama()
    theirs = torch.optim.SGD(groups(plain), **SGD)
    optimizer = kind(groups(model), **SGD)
    accelerator = SlideAccelerator(cpu=True)
    if order == "together":
        model, optimizer = accelerator.prepare(model, optimizer)
    else:
        model = accelerator.prepare(model)
        if order == "model first, evaluated":
            with torch.no_grad():
                model(input_ids=runs.batches(1)[0])
        before = engine_of(model)
        optimizer = accelerator.prepare(optimizer)
        assert engine_of(model) is not before  # that one was made for AdamW, as nothing was known
    assert engine_of(model).plan.moments == "sgd-momentum"
    for tokens in runs.batches(4):
        losses = []
        for one, stepped in ((plain, theirs), (model, optimizer)):
            loss = one(input_ids=tokens, labels=tokens, use_cache=False).loss
            losses.append(loss.item())
            loss.backward()
            clip = torch.nn.utils.clip_grad_norm_ if one is plain else accelerator.clip_grad_norm_
            clip(one.parameters(), 1.0)
            stepped.step()
            stepped.zero_grad()
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    runs.assert_same_weights(runs.masters(model, engine_of(model)), runs.masters(plain))


@pytest.mark.parametrize(("had", "wanted"), [(0.9, 0.0), (0.0, 0.9)])
@pytest.mark.usefixtures("fresh_accelerate_state")
def test_momentum_that_changes_before_the_model_is_prepared_again(had, wanted):
    accelerator, model, optimizer = _prepared(SlideSGD, lr=0.1, momentum=had)
    first, second = runs.batches(2)
    _step(accelerator, model, optimizer, first)
    for group in optimizer.param_groups:
        group["momentum"] = wanted
    engine = engine_of(model)
    with pytest.raises(
        StateError, match="its optimizer has state of the former kind; set its hyperparameters"
    ):
        accelerator.prepare(model)
    assert engine_of(model) is engine
    for group in optimizer.param_groups:
        group["momentum"] = had
    assert accelerator.prepare(model) is model
    _step(accelerator, model, optimizer, second)


@pytest.mark.parametrize("optim", ["sgd", "lion_32bit"])
def test_evaluation_before_training(tmp_path, optim):
    trainers = [
        runs.make(SlideTrainer, runs.llama(), tmp_path, optim=optim, learning_rate=1e-3) for _ in range(2)
    ]
    losses = [trainers[0].evaluate()["eval_loss"]]
    engine = trainers[0].slide.engine
    for trainer in trainers:
        trainer.train()
    assert trainers[0].slide.engine is engine, "it was prepared for the rule that the arguments name"
    assert runs.logged(trainers[0]) == runs.logged(trainers[1])
    losses += [trainer.evaluate()["eval_loss"] for trainer in trainers]
    assert losses[0] != losses[1] == losses[2]


def test_another_rule_for_the_same_trainer(tmp_path):
    trainer = runs.make(SlideTrainer, runs.llama(), tmp_path, optim="sgd", learning_rate=0.1)
    trainer.train()
    engine = trainer.slide.engine
    other = runs.make(SlideTrainer, trainer.model, tmp_path, optim="lion_32bit", learning_rate=1e-4)
    other.train()
    assert other.slide.engine is not engine
    assert isinstance(other.optimizer.optimizer, SlideLion)
    assert runs.logged(other)[0]["loss"] < runs.logged(trainer)[0]["loss"]


# -- Lion ----------------------------------------------------------------------------------------------------


class PublishedLion(torch.optim.Optimizer):
    """Algorithm 2 of Chen et al. 2023 (arXiv 2302.06675), line by line."""

    def __init__(self, params, lr, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                momentum = self.state[param].setdefault("exp_avg", torch.zeros_like(param))
                update = (beta1 * momentum + (1 - beta1) * param.grad).sign()
                param -= group["lr"] * (update + group["weight_decay"] * param)
                momentum.mul_(beta2).add_(param.grad, alpha=1 - beta2)


LIONS = {
    "as Trainer's AdamW": ({}, (0.9, 0.999)),
    "by Trainer's arguments": ({"adam_beta1": 0.8, "adam_beta2": 0.95}, (0.8, 0.95)),
    "by optim_args": ({"adam_beta1": 0.8, "optim_args": "beta1=0.95,beta2=0.98"}, (0.95, 0.98)),
    "scheduled": ({"lr_scheduler_type": "linear", "gradient_accumulation_steps": 2}, (0.9, 0.999)),
}


@pytest.mark.parametrize("name", LIONS)
def test_lion_is_the_published_one(tmp_path, name):
    assert importlib.util.find_spec("bitsandbytes") is None, "it must not be needed"
    settings, betas = LIONS[name]
    settings = {"learning_rate": 1e-3, "weight_decay": 0.3} | settings
    slide = runs.make(SlideTrainer, runs.llama(), tmp_path, optim="lion_32bit", **settings)
    settings.pop("optim_args", None)
    given = {"optimizer_cls_and_kwargs": (PublishedLion, {"lr": 1e-3, "betas": betas})}
    plain = runs.make(Trainer, runs.llama(), tmp_path, trainer_kwargs=given, **settings)
    for trainer in (plain, slide):
        trainer.train()
    assert [group["betas"] for group in slide.optimizer.param_groups] == [betas] * 2
    assert [group["weight_decay"] for group in slide.optimizer.param_groups] == [0.3, 0.0]
    assert slide.slide.plan.moments == "lion"
    # Where momentum and gradient cancel out, rounding decides the sign, and the weight goes the other way.
    runs.assert_same_logs(slide, plain)
    expected = runs.masters(plain.model)
    differing = sum(
        ((weight - expected[key]).abs() > 1e-6).sum().item()
        for key, weight in runs.masters(slide.model, slide.slide.engine).items()
    )
    assert differing <= 1e-3 * sum(weight.numel() for weight in expected.values())


# -- checkpoints ---------------------------------------------------------------------------------------------

KINDS = {
    "adamw": {},
    "lion": {"optim": "lion_32bit", "learning_rate": 1e-3},
    "sgd": {"optim": "sgd", "learning_rate": 0.1},
    "momentum": {"optim": "sgd", "optim_args": "momentum=0.9,dampening=0.3", "learning_rate": 0.1},
}
DTYPES = {"fp32": {}, "split": {"bf16": True}}


def _saving(tmp_path, kind, **settings):
    directory = tmp_path / kind
    trainer = runs.make(
        SlideTrainer, runs.llama(), directory, save_strategy="steps", save_steps=2, **KINDS[kind], **settings
    )
    trainer.train()
    return trainer, directory / "checkpoint-2"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", list(KINDS)[1:])
def test_resumed_run_has_the_bits_of_one_that_never_stopped(tmp_path, kind, dtype):
    whole, checkpoint = _saving(tmp_path, kind, **DTYPES[dtype])
    settings = {**KINDS[kind], **DTYPES[dtype], "save_strategy": "steps", "save_steps": 2}
    resumed = runs.make(SlideTrainer, runs.llama(seed=9), tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert runs.logged(resumed) == runs.logged(whole)
    ours, theirs = (trainer.optimizer.state_dict() for trainer in (resumed, whole))
    assert ours["param_groups"] == theirs["param_groups"]
    for index, values in theirs["state"].items():
        assert values.keys() == ours["state"][index].keys()
        assert all(torch.equal(bits(values[part]), bits(ours["state"][index][part])) for part in values)
    final, again = (runs.masters(one.model, one.slide.engine) for one in (whole, resumed))
    assert all(torch.equal(bits(final[name]), bits(again[name])) for name in final)
    files = {path.name for path in (checkpoint / "optimizer").iterdir()}
    # Plain SGD on fp32 weights keeps nothing, so there is nothing but the index.
    assert (files == {"index.json"}) == (kind == "sgd" and dtype == "fp32")


CROSSED = [
    ("adamw", "lion", "is AdamW, this one is Lion"),
    ("adamw", "sgd", "is AdamW, this one is SGD"),
    ("lion", "adamw", "is Lion, this one is AdamW"),
    ("sgd", "adamw", "is SGD, this one is AdamW"),
    ("sgd", "momentum", "the saved SGD has state in the format 'sgd', this one in 'sgd-momentum'"),
    ("momentum", "sgd", "the saved SGD has state in the format 'sgd-momentum', this one in 'sgd'"),
]


@pytest.mark.parametrize(("saved", "wanted", "message"), CROSSED)
def test_checkpoint_of_another_rule_is_refused_before_anything_changes(tmp_path, saved, wanted, message):
    _, checkpoint = _saving(tmp_path, saved)
    trainer = runs.make(SlideTrainer, runs.llama(seed=9), tmp_path / "other", **KINDS[wanted])
    before = runs.masters(trainer.model)
    with pytest.raises(CheckpointError, match=message):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    runs.assert_same_weights(runs.masters(trainer.model, trainer.slide.engine), before, atol=0)


def test_checkpoint_that_does_not_say_its_rule_is_adamws(tmp_path):
    whole, checkpoint = _saving(tmp_path, "adamw")
    for name, key in (("optimizer/index.json", "rule"), ("slideformer_checkpoint.json", "files")):
        values = json.loads((checkpoint / name).read_text())
        del (values if key == "rule" else values[key])["rule" if key == "rule" else "optimizer/index.json"]
        (checkpoint / name).write_text(json.dumps(values))
    resumed = runs.make(SlideTrainer, runs.llama(seed=9), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert runs.logged(resumed) == runs.logged(whole)
    lion = runs.make(SlideTrainer, runs.llama(seed=9), tmp_path / "lion", **KINDS["lion"])
    with pytest.raises(CheckpointError, match="is AdamW, this one is Lion"):
        lion.train(resume_from_checkpoint=str(checkpoint))


def _prepared(kind, seed=0, **hyperparameters):
    model = runs.llama(seed=seed)
    optimizer = kind(groups(model), **hyperparameters)
    accelerator = SlideAccelerator(cpu=True)
    return accelerator, *accelerator.prepare(model, optimizer)


def _step(accelerator, model, optimizer, tokens):
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize(
    ("kind", "hyperparameters"),
    [(SlideLion, {"lr": 1e-3}), (torch.optim.SGD, {"lr": 0.1}), (torch.optim.SGD, SGD)],
    ids=["lion", "sgd", "momentum"],
)
@pytest.mark.usefixtures("fresh_accelerate_state")
def test_save_state(tmp_path, kind, hyperparameters):
    one = _prepared(kind, **hyperparameters)
    first, second, third = runs.batches(3)
    _step(*one, first)
    one[0].save_state(str(tmp_path / "state"))
    losses = [_step(*one, second), _step(*one, third)]
    two = _prepared(kind, seed=9, **hyperparameters)
    _step(*two, third)
    two[0].load_state(str(tmp_path / "state"))
    assert [_step(*two, second), _step(*two, third)] == losses
    other = _prepared(SlideAdamW, seed=9, lr=1e-3)
    before = runs.masters(other[1], engine_of(other[1]))
    name = "Lion" if kind is SlideLion else "SGD"
    with pytest.raises(CheckpointError, match=f"the saved optimizer is {name}, this one is AdamW"):
        other[0].load_state(str(tmp_path / "state"))
    runs.assert_same_weights(runs.masters(other[1], engine_of(other[1])), before, atol=0)


def test_checkpoint_of_plain_trainer(tmp_path):
    settings = {"optim": "sgd", "learning_rate": 0.1}
    plain = runs.make(Trainer, runs.llama(), tmp_path, save_strategy="steps", save_steps=2, **settings)
    plain.train()
    for accepts, kind in ((True, "sgd"), (False, "momentum"), (False, "adamw")):
        slide = runs.make(SlideTrainer, runs.llama(seed=9), tmp_path / "slide", **KINDS[kind])
        if not accepts:
            with pytest.raises(CheckpointError, match="which does not go on from it|not those of AdamW"):
                slide.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
            continue
        slide.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert_alike(plain, slide)


# -- refused when the trainer is made ------------------------------------------------------------------------

REFUSED = {
    "name": (
        "sgd",
        "momentun=0.9",
        ConfigError,
        "'momentun=0.9' .* one of momentum, dampening, weight_decay, nesterov",
    ),
    "text": ("sgd", "momentum=high", ConfigError, "'momentum=high'"),
    "no value": ("sgd", "nesterov", ConfigError, "'nesterov' in 'nesterov' is not name=value"),
    "range": ("sgd", "momentum=-1", ConfigError, r"momentum must be finite and >= 0, got -1\.0"),
    "nesterov": ("sgd", "nesterov=True", ConfigError, "nesterov wants momentum above 0"),
    "betas": ("lion_32bit", "beta1=1.5", ConfigError, r"betas must be in \[0, 1\), got \(1\.5, 0\.999\)"),
    "Lion's name": ("lion_32bit", "momentum=0.9", ConfigError, "one of beta1, beta2"),
    "8-bit Lion": ("lion_8bit", None, UnsupportedModelError, "use 'adamw_torch', .*'lion_32bit' or 'sgd'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_are_refused_when_the_trainer_is_made(tmp_path, name):
    optim, optim_args, error, message = REFUSED[name]
    model = runs.llama()
    with pytest.raises(error, match=message):
        runs.make(SlideTrainer, model, tmp_path, optim=optim, optim_args=optim_args)
    assert engine_of(model) is None


@pytest.mark.parametrize("optim", ["sgd", "lion_32bit"])
def test_8bit_states_are_adamws(tmp_path, optim):
    config = {"slide_config": SlideConfig(optimizer_states="8bit")}
    with pytest.raises(ConfigError, match="optimizer_states='8bit' is for AdamW"):
        runs.make(SlideTrainer, runs.llama(), tmp_path, optim=optim, trainer_kwargs=config)


OPTIONS = {
    "maximize": ({"maximize": True}, "SGD's option maximize=True"),
    "differentiable": ({"differentiable": True}, "SGD's option differentiable=True"),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.usefixtures("fresh_accelerate_state")
def test_options_of_torchs_sgd(tmp_path, name):
    options, message = OPTIONS[name]
    with pytest.raises(UnsupportedModelError, match=message):
        _prepared(torch.optim.SGD, lr=0.1, **options)
    model = runs.llama()
    optimizer = torch.optim.SGD(groups(model, dampening=0.5), **SGD, nesterov=True)
    with pytest.raises(UnsupportedModelError, match=r"nesterov=True wants dampening=0, got dampening=0\.5"):
        runs.make(SlideTrainer, model, tmp_path, trainer_kwargs={"optimizers": (optimizer, None)})


# -- the plan ------------------------------------------------------------------------------------------------


def test_weights_on_disk_where_there_is_no_other_state(tmp_path):
    (tmp_path / "disk").mkdir()
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 12}
    in_ram, on_disk = (
        runs.make(
            SlideTrainer,
            runs.llama(**shape),
            tmp_path,
            trainer_kwargs={"slide_config": settings},
            **KINDS["sgd"],
        )
        for settings in (
            {"placement": "stream"},
            {"cpu_memory": "21MiB", "nvme_dir": str(tmp_path / "disk")},
        )
    )
    needed = sum(in_ram.slide.plan.peaks["train"][tier] for tier in ("GPU", "RAM"))
    assert needed > 21 * 2**20, "the test must want a disk"
    decisions = on_disk.slide.plan.decisions
    assert decisions.on_disk == decisions.weights_on_disk != ()
    count = len(decisions.on_disk)
    assert f"weights and gradients of {count} units on disk; " in str(on_disk.slide.plan)
    for trainer in (in_ram, on_disk):
        trainer.train()
    assert runs.logged(on_disk) == runs.logged(in_ram)


def test_plans_of_all_rules(tmp_path):
    plans = {}
    for kind, settings in KINDS.items():
        config = {"slide_config": {"placement": "stream", "gpu_memory": "1GiB"}}
        trainer = runs.make(
            SlideTrainer, runs.llama(), tmp_path, trainer_kwargs=copy.deepcopy(config), **settings
        )
        plans[kind] = trainer.slide.plan
        trainer.train()
        assert trainer.slide.plan.tier_bytes("RAM") == plans[kind].tier_bytes("RAM")
    moments = {
        kind: sum(item.nbytes for item in plan.items if item.what == "moments")
        for kind, plan in plans.items()
    }
    assert moments["adamw"] > moments["lion"] == moments["momentum"] > moments["sgd"] == 0
    assert moments["lion"] == pytest.approx(4 * plans["lion"].host_params, rel=0.25)  # whole pages
    times = {kind: plan.prediction.step_s for kind, plan in plans.items()}
    assert times["adamw"] >= times["lion"] == times["momentum"] >= times["sgd"]


# -- what is known of the optimizer only later, or not at all --------------------------------------------------------


def test_a_model_trained_by_sgd_is_evaluated_by_somebody_who_knows_no_optimizer(tmp_path):
    trainer = runs.make(
        SlideTrainer, runs.llama(), tmp_path, optim="sgd", optim_args="momentum=0.9", max_steps=1
    )
    trainer.train()
    engine = trainer.slide.engine
    SlideAccelerator(cpu=True).prepare(trainer.model)
    assert trainer.slide.engine is engine
    trainer.train()


class MakesItself(SlideTrainer):
    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        return self.optimizer


class NamesIt(SlideTrainer):
    def get_optimizer_cls_and_kwargs(self, args, model=None):
        return torch.optim.SGD, {"lr": self.rate, "momentum": 0.9, "foreach": False}

    rate = 0.1


@pytest.mark.parametrize("kind", [MakesItself, NamesIt])
def test_a_subclass_that_says_which_optimizer_resumes_its_own_checkpoint(tmp_path, kind):
    whole = runs.make(kind, runs.llama(), tmp_path / "whole", max_steps=2)
    whole.train()
    half = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps"}
    runs.make(kind, runs.llama(), tmp_path / "half", **half | {"max_steps": 1}).train()
    resumed = runs.make(kind, runs.llama(), tmp_path / "half", **half)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.slide.engine.rule.name == "SGD"
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


class CountingAdamW(SlideAdamW):
    steps = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)


def test_a_class_made_of_ours_is_kept(tmp_path):
    given = {"optimizer_cls_and_kwargs": (CountingAdamW, {"lr": 1e-3})}
    trainer = runs.make(SlideTrainer, runs.llama(), tmp_path, trainer_kwargs=given, max_steps=2)
    trainer.train()
    assert trainer.optimizer.optimizer.steps == 2


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((torch.optim.SGD, {"lr": 0.1, "momentun": 0.9}), ConfigError, "momentun"),
        (
            (functools.partial(torch.optim.SGD, momentum=0.9), {"lr": 0.1}),
            UnsupportedModelError,
            "cannot update",
        ),
    ],
)
def test_what_cannot_be_made_is_refused(tmp_path, given, error, message):
    with pytest.raises(error, match=message):
        runs.make(SlideTrainer, runs.llama(), tmp_path, trainer_kwargs={"optimizer_cls_and_kwargs": given})
