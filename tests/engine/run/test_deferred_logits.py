"""The loss seam: fused where a model's loss is cross-entropy, ordinary logits for everybody who reads them."""

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.trainer_pt_utils import LabelSmoother

from hf_slideformer import SlideConfig, SlideTrainer
from hf_slideformer.engine.model.head import find_head
from hf_slideformer.engine.run import deferred_logits as loss_seam
from hf_slideformer.engine.run.deferred_logits import DeferredLogits, defer_logits
from hf_slideformer.errors import ConfigError, StateError, UnsupportedModelError
from tests.engine.loop import prepare, tiny_llama
from tests.parity.data import collate, make_dataset
from tests.parity.models import _DECODER, MODELS, build
from tests.trainer import runs

VOCAB = 50
LABELS = torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))


class Reports:
    """What the seam said: tokens of fused losses, and the functions that read logits."""

    def __init__(self, head: nn.Linear) -> None:
        self.fused: list[int] = []
        self.readers: list[str] = []
        defer_logits(head, self.fused.append, self.readers.append)


def make_head(dtype=torch.float32, bias=False):
    torch.manual_seed(0)
    head = nn.Linear(16, VOCAB, bias=bias).to(dtype)
    return head, copy.deepcopy(head)


def run(head, consume, hidden):
    """Loss, and gradients of hidden states and head, of `consume(head(hidden))`."""
    hidden = hidden.clone().requires_grad_()
    head.zero_grad()
    loss = consume(head(hidden))
    loss.backward()
    return [loss.detach(), hidden.grad, *(param.grad.clone() for param in head.parameters())]


class Square(torch.autograd.Function):
    """A custom Function, which takes its argument as it is."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def write_then_loss(x):
    x[..., :5] = -3.0
    return F.cross_entropy(x.view(-1, VOCAB), LABELS.view(-1))


def write_to_view_then_loss(x):
    x.view(-1, VOCAB)[:, 3:9] *= 0.5
    return F.cross_entropy(x.view(-1, VOCAB), LABELS.view(-1))


def after_metrics(x):
    with torch.no_grad():
        assert x.argmax(-1).shape == LABELS.shape
    return F.cross_entropy(x.float().view(-1, VOCAB), LABELS.view(-1))


def flat(x):
    return x.float().view(-1, VOCAB)


FUSED = {
    "as transformers": lambda x: F.cross_entropy(flat(x), LABELS.view(-1)),
    "sum by count": lambda x: F.cross_entropy(flat(x), LABELS.view(-1), reduction="sum") / 5,
    "shifted": lambda x: F.cross_entropy(
        x[..., :-1, :].contiguous().view(-1, VOCAB), LABELS[..., 1:].reshape(-1)
    ),
    "keywords": lambda x: F.cross_entropy(
        input=x.to(dtype=torch.float32).view(-1, VOCAB), target=LABELS.view(-1)
    ),
    "one sequence": lambda x: F.cross_entropy(x[1], LABELS[1]),
    "module": lambda x: nn.CrossEntropyLoss(ignore_index=7, label_smoothing=0.1)(
        x.flatten(0, 1), LABELS.view(-1)
    ),
    "scaled": lambda x: F.cross_entropy(flat(0.25 * x * 2), LABELS.view(-1)),
    "divided": lambda x: F.cross_entropy(flat(x / 3.0), LABELS.view(-1)),
    "capped": lambda x: F.cross_entropy(flat(torch.tanh(x / 0.5) * 0.5), LABELS.view(-1)),
    "scaled and capped": lambda x: F.cross_entropy(flat(torch.tanh(x * 3 / 0.5) * 0.5), LABELS.view(-1)),
    "cap with scaled end": lambda x: F.cross_entropy(flat(torch.tanh(x) * 4.0 / 2), LABELS.view(-1)),
}
READ = {
    "own function": Square.apply,
    "own function of a view": lambda x: Square.apply((x / 2.0)[:, 1:]),
    "unreduced": lambda x: F.cross_entropy(flat(x), LABELS.view(-1), reduction="none").mean(),
    "class weights": lambda x: F.cross_entropy(flat(x), LABELS.view(-1), torch.linspace(0, 1, VOCAB)),
    "soft labels": lambda x: F.cross_entropy(flat(x), torch.full((14, VOCAB), 1 / VOCAB)),
    "log_softmax": lambda x: -F.log_softmax(x, -1).gather(-1, LABELS[..., None]).mean(),
    "capped twice": lambda x: F.cross_entropy(flat(torch.tanh(torch.tanh(x))), LABELS.view(-1)),
    "part of the vocabulary": lambda x: F.cross_entropy(x[..., :40].reshape(-1, 40), LABELS.view(-1) % 40),
    "transposed": lambda x: F.cross_entropy(x.transpose(1, 2), LABELS),
    "written to": write_then_loss,
    "view written to": write_to_view_then_loss,
    "metrics first": after_metrics,
    "keyword product": lambda x: torch.mul(input=x, other=0.5).sum(),
    "added up": lambda x: sum([x]).sum(),
}
BOTH = {**FUSED, **READ}


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("consumer", BOTH)
def test_loss_and_gradients_are_those_of_plain_logits(consumer, bias):
    head, plain = make_head(bias=bias)
    reports = Reports(head)
    hidden = 4 * torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(2))
    ours, theirs = run(head, BOTH[consumer], hidden), run(plain, BOTH[consumer], hidden)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert bool(reports.fused) == (consumer in FUSED)
    assert bool(reports.readers) == (consumer in READ)


@pytest.mark.parametrize("consumer", READ)
def test_what_reads_logits_gets_the_same_bits(consumer):
    head, plain = make_head()
    Reports(head)
    hidden = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(2))
    for actual, expected in zip(
        run(head, READ[consumer], hidden), run(plain, READ[consumer], hidden), strict=True
    ):
        assert torch.equal(actual, expected)


def test_metadata_needs_no_logits():
    head, plain = make_head(torch.bfloat16)
    reports = Reports(head)
    hidden = torch.randn(2, 7, 16, dtype=torch.bfloat16)
    ours, theirs = head(hidden), plain(hidden)
    assert isinstance(ours, DeferredLogits) and isinstance(ours, torch.Tensor)
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.size(-1) == VOCAB and ours.numel() == theirs.numel() and len(ours) == 2
    assert ours.float().dtype == torch.float32 and ours[:, -1, :].shape == (2, VOCAB)
    assert not reports.readers
    assert torch.equal(ours, theirs) and reports.readers == ["equal"]
    with torch.no_grad():
        assert not head(hidden).requires_grad


def test_reading_late_keeps_the_grad_mode_of_the_forward():
    head, _ = make_head()
    Reports(head)
    hidden = torch.randn(3, 16)
    logits = head(hidden)
    with torch.no_grad():
        assert logits.exp().shape == (3, VOCAB)  # reads
    logits.sum().backward()
    assert head.weight.grad is not None
    with torch.inference_mode():
        logits = head(hidden)
    assert logits.argmax(-1).shape == (3,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype):
    head, plain = make_head(dtype)
    Reports(head)
    hidden = torch.randn(2, 7, 16)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = head(hidden), plain(hidden)
        fused, expected = FUSED["as transformers"](ours), FUSED["as transformers"](theirs)
    assert torch.equal(ours, theirs) and ours.dtype == torch.bfloat16
    fused.backward()
    expected.backward()
    torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.weight.grad, plain.weight.grad, rtol=2e-2, atol=1e-3)
    assert head.weight.grad.dtype == dtype


EXTRA = {
    "gemma2 with a low cap": ("gemma2", {"final_logit_softcapping": 2.0}),
    "tied llama": ("llama", {"tie_word_embeddings": True}),
}
FAMILIES = {name: (name, {}) for name, spec in MODELS.items() if spec.task != "classification"} | EXTRA
OTHERS = {
    "cohere": ("CohereConfig", "CohereForCausalLM", {"logit_scale": 0.3}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {"logits_scaling": 4.0}),
    "bert": ("BertConfig", "BertForMaskedLM", {}),
}


def build_family(name):
    if name in FAMILIES:
        base, overrides = FAMILIES[name]
        return build(base, **overrides), MODELS[base].task
    config_class, model_class, overrides = OTHERS[name]
    torch.manual_seed(0)
    settings = {key: value for key, value in _DECODER.items() if key != "head_dim"}
    config = getattr(transformers, config_class)(**{**settings, **overrides})
    return getattr(transformers, model_class)(config), "causal"


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_families(family):
    model, task = build_family(family)
    plain = copy.deepcopy(model)
    choice = find_head(model, mode="fused", on_gpu=False)
    assert choice.module is model.get_output_embeddings(), choice.reason
    reports = Reports(choice.module)
    batch = collate([make_dataset(task, 4, seed=3)[i] for i in range(4)])
    outputs = []
    for one in (model, plain):
        one.train()
        torch.manual_seed(5)
        outputs.append(one(**batch))
        outputs[-1].loss.backward()
    if family.startswith("bart"):  # adds a buffer to its logits
        assert not reports.fused and reports.readers == ["add"]
    else:
        assert reports.fused and not reports.readers
    ours, theirs = outputs
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)
    largest = max(param.grad.abs().max() for param in plain.parameters() if param.grad is not None)
    for (name, actual), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        if expected.grad is None:
            assert actual.grad is None, name
        else:
            torch.testing.assert_close(
                actual.grad, expected.grad, rtol=1e-4, atol=1e-6 * largest.item(), msg=name
            )
    assert torch.equal(ours.logits.detach(), theirs.logits)


def test_generation_is_unchanged():
    model = runs.llama()
    plain = copy.deepcopy(model)
    Reports(model.lm_head)
    prompt = torch.tensor([[5, 6, 7]])
    arguments = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(prompt, **arguments), plain.generate(prompt, **arguments))


class LargestLogits(TorchDispatchMode):
    """Remembers the most rows of logits that an operator returned."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_real = isinstance(result, torch.Tensor) and result.device.type != "meta"
        if is_real and result.dim() and result.shape[-1] == self.vocabulary:
            self.rows = max(self.rows, result.numel() // self.vocabulary)
        return result


def test_all_logits_are_never_there(monkeypatch):
    budget = 3 * 64 * 4  # three rows, padded to 64 entries
    fused = functools.partial(loss_seam.linear_cross_entropy, memory_budget=budget)
    monkeypatch.setattr(loss_seam, "linear_cross_entropy", fused)
    head = nn.Linear(2, VOCAB)  # narrow, so that the transposed weight does not pass for logits
    Reports(head)
    hidden = torch.randn(2, 7, 2, requires_grad=True)
    with LargestLogits(VOCAB) as seen:
        logits = head(hidden)
        FUSED["as transformers"](logits).backward()
    assert 0 < seen.rows <= 3
    with LargestLogits(VOCAB) as seen:
        logits.exp()
    assert seen.rows == 14  # the mode does see logits


def test_logits_of_old_weights_are_refused_unless_they_were_read():
    run = prepare(tiny_llama(torch.float32), bf16=False, config=SlideConfig(loss="fused"))
    tokens = torch.arange(32).view(2, 16) % 96
    first = run.model(input_ids=tokens, labels=tokens, use_cache=False)
    before = first.logits.argmax(-1)
    second = run.model(input_ids=tokens, labels=tokens, use_cache=False)
    second.loss.backward()
    run.optimizer.step()
    assert torch.equal(first.logits.argmax(-1), before)
    with pytest.raises(StateError, match="before the step"):
        second.logits.argmax(-1)


def test_hidden_states_written_after_the_head_are_noticed():
    head, _ = make_head()
    Reports(head)
    hidden = torch.randn(2, 7, 16)
    logits = head(hidden)
    hidden.zero_()
    with pytest.raises(StateError, match="changed"):
        FUSED["as transformers"](logits)


def test_a_function_that_hides_its_work_gets_no_logits_written_in_place():
    head, _ = make_head()
    Reports(head)
    logits = head(torch.randn(2, 7, 16))
    logits[..., :5] = 0.0
    with pytest.raises(StateError, match="written in place"):
        Square.apply(logits).backward()


def test_nothing_outlives_its_use():
    head, _ = make_head()
    Reports(head)
    hidden = torch.randn(2, 7, 16, requires_grad=True)
    logits = head(hidden)
    loss = FUSED["as transformers"](logits)
    loss.backward()
    alive = weakref.ref(logits)
    del logits, loss
    gc.collect()
    assert alive() is None


def test_copies_are_ordinary_models():
    run = prepare(tiny_llama(torch.float32), bf16=False, config=SlideConfig(loss="fused"))
    tokens = torch.arange(16).view(1, 16)
    ours = run.model(input_ids=tokens, use_cache=False).logits
    copied = copy.deepcopy(run.model)
    assert "forward" not in copied.lm_head.__dict__ or not isinstance(
        copied.lm_head.forward, loss_seam.HeadForward
    )
    theirs = copied(input_ids=tokens, use_cache=False).logits
    assert type(theirs) is torch.Tensor and torch.equal(ours, theirs)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    assert copied(input_ids=tokens, use_cache=False).logits.abs().sum() == 0
    with pytest.raises(UnsupportedModelError, match="pickled"):
        pickle.dumps(run.model.lm_head)


class OtherHead(nn.Linear):
    """A head with something of its own."""


def test_heads_that_are_left_alone():
    def reason(model, mode="fused", on_gpu=False):
        choice = find_head(model, mode=mode, on_gpu=on_gpu)
        assert choice.module is None and choice.reason in choice.note
        return choice.reason

    assert "loss='model'" in reason(runs.llama(), mode="model", on_gpu=True)
    assert "CPU" in reason(runs.llama(), mode="auto")
    assert find_head(runs.llama(), mode="auto", on_gpu=True).module is not None
    model = runs.llama()
    model.lm_head = OtherHead(32, runs.VOCAB)
    assert "OtherHead" in reason(model)
    model = runs.llama()
    model.forward = lambda **kwargs: None
    assert "LlamaForCausalLM.forward was replaced" in reason(model)
    assert "float16" in reason(runs.llama().half())
    assert "no output embeddings" in reason(runs.llama().model)
    with pytest.raises(ConfigError, match="loss='fuse'"):
        SlideConfig(loss="fuse")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"label_smoothing_factor": 0.1},
        {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.0},
    ],
    ids=str,
)
def test_trainer_trains_as_plain_trainer(settings, tmp_path):
    plain = runs.make(transformers.Trainer, runs.llama(), tmp_path / "plain", **settings)
    plain.train()
    fused = runs.make(
        SlideTrainer,
        runs.llama(),
        tmp_path / "fused",
        trainer_kwargs={"slide_config": {"loss": "fused"}},
        **settings,
    )
    assert "run fused" in str(fused.slide.plan)
    fused.train()
    runs.assert_same_logs(fused, plain)
    tokens = 4 * 2 * 12 * settings.get("gradient_accumulation_steps", 1)
    shifted = 11 / 12 if "label_smoothing_factor" in settings else 1
    assert fused.slide.metrics["fused_loss_tokens"] == tokens * shifted


def test_evaluation_with_metrics_sees_the_logits(tmp_path):
    def compute_metrics(prediction):
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    kwargs = {"compute_metrics": compute_metrics}
    plain = runs.make(transformers.Trainer, runs.llama(), tmp_path / "a", trainer_kwargs=kwargs)
    fused = runs.make(
        SlideTrainer,
        runs.llama(),
        tmp_path / "b",
        trainer_kwargs={**kwargs, "slide_config": {"loss": "fused"}},
    )
    expected, actual = plain.evaluate(), fused.evaluate()
    assert actual["eval_accuracy"] == expected["eval_accuracy"]
    assert actual["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert torch.equal(
        torch.tensor(fused.predict(runs.Tokens(4)).predictions),
        torch.tensor(plain.predict(runs.Tokens(4)).predictions),
    )


def test_plan_names_a_loss_that_reads_all_logits(tmp_path, caplog):
    def own_loss(outputs, labels, num_items_in_batch=None):
        return -F.log_softmax(outputs.logits, -1).gather(-1, labels[..., None]).mean()

    trainer = runs.make(
        SlideTrainer,
        runs.llama(),
        tmp_path,
        trainer_kwargs={"slide_config": {"loss": "fused"}, "compute_loss_func": own_loss},
    )
    trainer.train()
    assert any("`log_softmax`" in note for note in trainer.slide.plan.notes)
    assert sum("`log_softmax`" in record.getMessage() for record in caplog.records) == 1


def test_head_gradient_is_summed_in_fp32_over_micro_batches():
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("needs torch >= 2.10")
    run = prepare(tiny_llama(torch.bfloat16), bf16=True, config=SlideConfig(loss="fused"), accumulates=True)
    tokens = torch.arange(32).view(2, 16) % 96
    run.model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    grad = run.model.lm_head.weight.grad
    assert grad.dtype == torch.float32
    assert not torch.equal(grad, grad.bfloat16().float())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_logits_without_gradients_give_losses_without_gradients(mode):
    head, plain = make_head()
    Reports(head)
    hidden = torch.randn(2, 7, 16)
    with mode():
        logits = head(hidden)
    assert not FUSED["as transformers"](logits).requires_grad
    logits = head(hidden)
    with mode():
        later = logits.float().view(-1, VOCAB)
    assert not F.cross_entropy(later, LABELS.view(-1)).requires_grad
    # Both kinds in one sum: only one of them reaches the head.
    loss = FUSED["as transformers"](logits) + F.cross_entropy(later, LABELS.view(-1))
    loss.backward()
    FUSED["as transformers"](plain(hidden)).backward()
    torch.testing.assert_close(head.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-6)


def test_metrics_in_inference_mode_leave_the_gradient_alone():
    head, plain = make_head()
    Reports(head)
    hidden = torch.randn(2, 7, 16)
    logits = head(hidden)
    with torch.inference_mode():
        logits.argmax(-1)
    FUSED["as transformers"](logits).backward()
    FUSED["as transformers"](plain(hidden)).backward()
    assert torch.equal(head.weight.grad, plain.weight.grad)


COPIES = {
    "quotient": lambda x: x / 2.0,
    "tanh": torch.tanh,
    "contiguous slice": lambda x: x[:, :-1].contiguous(),
    "quotient of a view": lambda x: x.view(-1, VOCAB) / 2.0,
    "view": lambda x: x.view(-1, VOCAB),
}


@pytest.mark.parametrize("copy_of", COPIES)
def test_copies_do_not_see_what_is_written_later(copy_of):
    def consume(x):
        taken = COPIES[copy_of](x)
        x[..., 3] = -30.0
        return taken.softmax(-1).square().sum() + x.logsumexp(-1).sum()

    head, plain = make_head()
    Reports(head)
    hidden = torch.randn(2, 7, 16)
    for actual, expected in zip(run(head, consume, hidden), run(plain, consume, hidden), strict=True):
        assert torch.equal(actual, expected)


def test_writes_out_of_sight_before_a_copy_is_computed_are_noticed():
    head, _ = make_head()
    Reports(head)
    with torch.no_grad():
        logits = head(torch.randn(2, 7, 16))
        taken = logits.view(-1, VOCAB) / 2.0
        logits.detach().zero_()  # detach gives the plain tensor, whose writes nobody sees
        with pytest.raises(StateError, match="out of torch's sight"):
            taken.exp()


def test_in_place_changes_of_metadata_show():
    head, _ = make_head()
    Reports(head)
    logits = head(torch.randn(7, 16))
    logits.unsqueeze_(0)
    assert logits.shape == (1, 7, VOCAB) and logits.dim() == 3


def test_gradients_asked_for_after_a_fused_loss_are_refused():
    head, _ = make_head()
    Reports(head)
    logits = head(torch.randn(2, 7, 16))
    FUSED["as transformers"](logits)
    with pytest.raises(StateError, match="before the loss"):
        logits.retain_grad()
    with pytest.raises(StateError, match="before the loss"):
        logits.register_hook(print)
    logits = head(torch.randn(2, 7, 16))
    logits.retain_grad()
    FUSED["as transformers"](logits).backward()
    assert logits.grad.abs().sum() > 0


def test_labels_out_of_range_are_torchs_error():
    head, _ = make_head()
    Reports(head)
    with pytest.raises(IndexError):
        F.cross_entropy(head(torch.randn(3, 16)), torch.tensor([1, VOCAB, 2]))


def test_head_takes_its_argument_by_name():
    head, plain = make_head()
    Reports(head)
    hidden = torch.randn(3, 16)
    assert torch.equal(head(input=hidden), plain(input=hidden))


@pytest.mark.parametrize(
    ("given", "loss", "seen"),
    [
        (None, "fused", {"fused_linear_cross_entropy": False}),
        ({"rope": False}, "fused", {"rope": False, "fused_linear_cross_entropy": False}),
        ({"fused_linear_cross_entropy": True}, "fused", {"fused_linear_cross_entropy": True}),
        (None, "model", None),
    ],
)
def test_liger_leaves_the_head_to_us_unless_asked(given, loss, seen, tmp_path, monkeypatch):
    trainer = runs.make(
        SlideTrainer,
        runs.llama(),
        tmp_path,
        use_liger_kernel=True,
        liger_kernel_config=given,
        trainer_kwargs={"slide_config": {"loss": loss}},
        max_steps=1,
    )
    applied = []
    monkeypatch.setattr(
        "transformers.trainer.apply_liger_kernel", lambda model, config: applied.append(config)
    )
    trainer.train()
    assert applied == [seen]
    assert trainer.args.liger_kernel_config == given  # the user's, who may use it again


def test_label_smoother_is_still_trainers(tmp_path):
    trainer = runs.make(SlideTrainer, runs.llama(), tmp_path, label_smoothing_factor=0.1)
    assert isinstance(trainer.label_smoother, LabelSmoother) and trainer.label_smoother.epsilon == 0.1
