"""Key-value caches that models hand their layers while gradients flow: losses and gradients are those without them.

`use_cache` is left on, as it is in every configuration, and batches are padded.
"""

import collections
import copy
import dataclasses
import functools
import types

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, MambaConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_slideformer.engine.run.caches import check_empty, is_cache
from hf_slideformer.errors import UnsupportedModelError
from tests.engine.loop import prepare, tiny_llama

VOCAB = 64
_TOKENS = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_DECODER = dict(
    **_TOKENS,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    initializer_range=0.15,
    tie_word_embeddings=False,
)
_WINDOW = dict(sliding_window=4, query_pre_attn_scalar=8)
_SEQ2SEQ = dict(
    **_TOKENS,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    decoder_start_token_id=1,
    forced_eos_token_id=None,
    init_std=0.15,
    dropout=0.1,
)
_T5 = dict(
    **_TOKENS,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=4,
    decoder_start_token_id=1,
)
_STATES = dict(mamba_d_state=8, mamba_d_conv=4, mamba_expand=2)

# By class of the model: class and arguments of its configuration. All make caches of another kind.
TEXT = {
    "LlamaForCausalLM": ("LlamaConfig", _DECODER),
    "MistralForCausalLM": ("MistralConfig", {**_DECODER, "sliding_window": 4}),
    "Gemma2ForCausalLM": ("Gemma2Config", {**_DECODER, **_WINDOW}),
    "Gemma3ForCausalLM": (
        "Gemma3TextConfig",
        {
            **_DECODER,
            **_WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "GPT2LMHeadModel": ("GPT2Config", {**_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "MambaForCausalLM": (
        "MambaConfig",
        {**_TOKENS, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2},
    ),
    "JambaForCausalLM": (
        "JambaConfig",
        {
            **_DECODER,
            **_STATES,
            "num_experts": 2,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    "Qwen3NextForCausalLM": (
        "Qwen3NextConfig",
        {
            **_DECODER,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "T5ForConditionalGeneration": ("T5Config", _T5),
}


def build(name, config_name, config):
    made = getattr(transformers, config_name)(**config)
    torch.manual_seed(0)
    return getattr(transformers, name)(made).train()


def padded(**more):
    ids = torch.randint(4, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {
        "input_ids": ids.masked_fill(mask == 0, 0),
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
        **more,
    }


def loss_and_gradients(model, batch):
    torch.manual_seed(3)  # of dropout
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: param.grad for name, param in model.named_parameters()}


def assert_as_plain(model, batch):
    """Loss and all gradients agree with those of the same model without an engine, and some are not zero."""
    expected_loss, expected = loss_and_gradients(copy.deepcopy(model), batch)
    run = prepare(model, bf16=False)
    loss, gradients = loss_and_gradients(run.model, batch)
    run.engine.synchronize()
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    trained = [name for name, grad in expected.items() if grad is not None and grad.any()]
    assert any(state.streams and state.name in trained for state in run.engine.states)
    for name in trained:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.fixture
def handed_over(monkeypatch):
    """Counts the caches that models hand to layers: a model that makes none would prove nothing."""
    from hf_slideformer.engine.run import arguments

    seen = collections.Counter()
    original = arguments.check_empty

    def count(cache):
        seen[type(cache).__name__] += 1
        original(cache)

    monkeypatch.setattr(arguments, "check_empty", count)
    return seen


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM", "Gemma3ForCausalLM"])
def test_a_padded_batch_in_either_attention(name, attention, handed_over):
    config_name, config = TEXT[name]
    assert_as_plain(build(name, config_name, {**config, "attn_implementation": attention}), padded())
    assert handed_over["DynamicCache"] == config["num_hidden_layers"]


@pytest.mark.parametrize(
    "name", [name for name in TEXT if name not in ("LlamaForCausalLM", "MistralForCausalLM")]
)
def test_a_padded_batch(name, handed_over):
    # Some families turn it off in training if nobody asks for it.
    assert_as_plain(build(name, *TEXT[name]), padded(use_cache=True))
    assert handed_over


def test_states_that_are_handed_over_one_by_one():
    # xLSTMCache is no Cache, and layers are handed its tensors. What the model writes there in place makes autograd
    # refuse plain training too; without it all is as ever.
    name = "xLSTMForCausalLM"
    config = {
        **_TOKENS,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_blocks": 2,
        "num_heads": 4,
        "chunk_size": 4,
        "qk_dim_factor": 0.5,
    }
    batch = padded()
    del batch["attention_mask"]
    run = prepare(build(name, "xLSTMConfig", config), bf16=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run.model(**batch).loss.backward()
    assert_as_plain(build(name, "xLSTMConfig", config), {**batch, "use_cache": False})


def test_speech_with_an_encoder_decoder_cache(handed_over):
    config = {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16}
    model = build("WhisperForConditionalGeneration", "WhisperConfig", config)
    features = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    batch = padded()
    labels = batch["labels"]
    assert_as_plain(
        model,
        {
            "input_features": features,
            "decoder_input_ids": batch["input_ids"],
            "decoder_attention_mask": batch["attention_mask"],
            "labels": labels,
            "use_cache": True,
        },
    )
    assert handed_over["EncoderDecoderCache"] == config["decoder_layers"]


_VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, patch_size=4)
IMAGE_TOKEN = 5


def qwen2_vl():
    text = {
        **_DECODER,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    vision = dict(depth=2, embed_dim=32, hidden_size=32, num_heads=4, patch_size=4, mlp_ratio=2)
    config = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
        **_TOKENS,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(config).train()
    # Two images of 4 x 4 patches, of which four make a token.
    pixels = torch.randn(32, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(2))
    return model, {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}, 4


def llava():
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_DECODER),
        vision_config=transformers.CLIPVisionConfig(image_size=8, projection_dim=32, **_VISION),
        image_token_index=IMAGE_TOKEN,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).train()
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return model, {"pixel_values": pixels}, 4


@pytest.mark.parametrize("images", [False, True], ids=["text", "images"])
@pytest.mark.parametrize("make", [qwen2_vl, llava])
def test_text_of_a_model_that_sees(make, images, handed_over):
    # Trainer turns `use_cache` off at the top of the configuration, and the text's keeps it.
    model, pixels, tokens = make()
    model.config.use_cache = False
    assert model.config.get_text_config().use_cache
    batch = padded()
    if images:
        batch["input_ids"][:, :tokens] = IMAGE_TOKEN
        batch["labels"][:, :tokens] = -100
        if make is qwen2_vl:
            batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).int()
        batch |= pixels
    assert_as_plain(model, batch)
    assert handed_over["DynamicCache"] == 3


class Wrapped(nn.Module):
    """A script's own module around a model: it has no configuration in which somebody turned `use_cache` off."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input_ids, attention_mask, labels):
        logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits * self.scale
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return types.SimpleNamespace(loss=loss)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "JambaForCausalLM"])
def test_a_model_inside_a_module(name, handed_over):
    model = build(name, *TEXT[name])
    assert model.config.use_cache
    model.model.config.use_cache = True
    assert_as_plain(Wrapped(model), padded())
    assert handed_over


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM", "T5ForConditionalGeneration"])
def test_adapters(name, handed_over):
    from peft import LoraConfig, get_peft_model

    targets = ["q", "v"] if name.startswith("T5") else ["q_proj", "down_proj"]
    model = get_peft_model(build(name, *TEXT[name]), LoraConfig(r=4, target_modules=targets))
    for module_name, param in model.named_parameters():
        if "lora_B" in module_name:
            torch.nn.init.normal_(param, std=0.1)
    assert_as_plain(model, padded())
    assert handed_over


# -- wherever the cache is ---------------------------------------------------------------------------------------------


class Store:
    """A cache of somebody's own, which knows nothing of transformers' but what its layers call."""

    def __init__(self):
        self.kept = []

    def update(self, key, value):
        self.kept.append((key, value))
        return torch.cat([k for k, _ in self.kept], 1), torch.cat([v for _, v in self.kept], 1)

    def get_seq_length(self):
        return sum(key.shape[1] for key, _ in self.kept)

    filled = get_seq_length


class NamedCache:
    """One that is known by its name only, with room made in advance."""

    def __init__(self, width=16):
        self.keys = torch.zeros(2, 32, width)
        self.used = 0

    def add(self, key):
        end = self.used + key.shape[1]
        self.keys = self.keys.clone()
        self.keys[:, self.used : end] = key
        self.used = end
        return self.keys[:, :end]

    def filled(self):
        return self.used


class Subclass(dict):
    """A dictionary that counts its positions."""

    def update(self, key):
        self["key"] = torch.cat([self["key"], key], 1) if self else key
        return self["key"]

    def get_seq_length(self):
        return self["key"].shape[1] if self else 0

    filled = get_seq_length


KeyValue = collections.namedtuple("KeyValue", "key value")


class Attention(GradientCheckpointingLayer):
    """Looks for its cache where `find` says, and uses it if it is there."""

    def __init__(self, width=16):
        super().__init__()
        self.project = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, hidden, past=None, *more, use_cache=False, memory=None, **others):
        key, value = self.project(hidden).chunk(2, -1)
        for found in self._caches((past, more, memory, others)):
            if isinstance(found, Store):
                key, value = found.update(key, value)
            elif isinstance(found, NamedCache):
                key = found.add(key)
            elif isinstance(found, Subclass):
                key = found.update(key)
        return hidden + self.out(torch.softmax(hidden @ key.transpose(1, 2), -1) @ value)

    def _caches(self, place):
        if isinstance(place, (Store, NamedCache, Subclass)):
            yield place
        elif isinstance(place, (tuple, list, dict)):
            for inner in place.values() if isinstance(place, dict) else place:
                yield from self._caches(inner)


class Stack(nn.Module):
    """A model that makes one cache for every layer and hands it over by `hand`."""

    def __init__(self, hand, make):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 16)
        self.layers = nn.ModuleList(Attention() for _ in range(3))
        self.head = nn.Linear(16, VOCAB)
        self.hand, self.make = hand, make

    def forward(self, input_ids, labels):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = self.hand(layer, hidden, self.make())
        loss = nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())
        return types.SimpleNamespace(loss=loss)


HANDS = {
    "positional": lambda layer, hidden, cache: layer(hidden, cache),
    "last_positional": lambda layer, hidden, cache: layer(hidden, None, 1.0, cache),
    "any_name": lambda layer, hidden, cache: layer(hidden, whatever=cache),
    "in_a_tuple": lambda layer, hidden, cache: layer(hidden, (cache, None)),
    "in_a_dictionary": lambda layer, hidden, cache: layer(hidden, memory={"self": cache, "cross": None}),
    "deep": lambda layer, hidden, cache: layer(hidden, memory=[{"all": (None, cache)}]),
    "ordered": lambda layer, hidden, cache: layer(hidden, memory=collections.OrderedDict(past=cache)),
    "named_tuple": lambda layer, hidden, cache: layer(hidden, KeyValue(cache, None)),
}


@pytest.mark.parametrize("make", [Store, NamedCache, Subclass])
@pytest.mark.parametrize("hand", HANDS)
def test_a_cache_of_any_class_in_any_place(hand, make):
    batch = {key: value for key, value in padded().items() if key != "attention_mask"}
    model = Stack(HANDS[hand], make)
    made = []
    model.make = lambda: made.append(make()) or made[-1]
    assert_as_plain(model, batch)
    # Plain training has filled its own three; none of the engine's was touched.
    assert [bool(cache.filled()) for cache in made] == [True] * 3 + [False] * 3


def test_a_tuple_of_keys_and_values_is_an_argument_like_any_other():
    # What versions before the cache classes handed over; gradients reach it.
    class Reader(Attention):
        def forward(self, hidden, past):
            key, value = past
            return hidden + self.out(torch.softmax(hidden @ key.transpose(1, 2), -1) @ value)

    class Model(Stack):
        def __init__(self, kind):
            super().__init__(None, None)
            self.layers = nn.ModuleList(Reader() for _ in range(2))
            self.before = nn.Linear(16, 32)
            self.kind = kind

        def forward(self, input_ids, labels):
            hidden = self.embed(input_ids)
            past = self.kind(*self.before(hidden).chunk(2, -1))
            for layer in self.layers:
                hidden = layer(hidden, past)
            loss = nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())
            return types.SimpleNamespace(loss=loss)

    batch = {key: value for key, value in padded().items() if key != "attention_mask"}
    for kind in (lambda key, value: (key, value), KeyValue):
        model = Model(kind)
        assert_as_plain(model, batch)
        assert model.before.weight.grad.any()


@dataclasses.dataclass
class Context:
    """A script's own bundle of arguments."""

    cache: object
    step: int = 0


@pytest.mark.parametrize(
    "wrap",
    [
        Context,
        lambda cache: collections.UserDict(past=cache),
        lambda cache: types.SimpleNamespace(past=cache),
    ],
)
def test_a_cache_that_cannot_be_taken_out_is_refused(wrap):
    run = prepare(tiny_llama(torch.float32), bf16=False)
    hidden = torch.zeros(1, 4, 64, requires_grad=True)
    rope = run.model.model.rotary_emb(hidden, torch.arange(4)[None])
    layer = run.model.model.layers[0]
    with pytest.raises(UnsupportedModelError, match="with a key-value cache in it"):
        layer(hidden, position_embeddings=rope, bundle=wrap(DynamicCache()))
    layer(hidden, position_embeddings=rope, bundle=wrap(None))


# -- caches that are in use --------------------------------------------------------------------------------------------


def filled_states():
    """A cache of recurrent layers only, which does not count positions."""
    model = build("MambaForCausalLM", *TEXT["MambaForCausalLM"]).eval()
    with torch.no_grad():
        out = model(input_ids=torch.arange(8).view(1, 8), use_cache=True)
    return next(value for value in out.values() if is_cache(value))


def filled_encoder_decoder():
    model = build("T5ForConditionalGeneration", *TEXT["T5ForConditionalGeneration"]).eval()
    with torch.no_grad():
        ids = torch.arange(8).view(1, 8)
        out = model(input_ids=ids, decoder_input_ids=ids, use_cache=True)
    return next(value for value in out.values() if is_cache(value))


def filled_store():
    store = Store()
    store.update(torch.ones(1, 3, 4), torch.ones(1, 3, 4))
    return store


def filled_by_name():
    cache = NamedCache()
    cache.add(torch.ones(2, 3, 16))
    return cache


@pytest.mark.parametrize(
    ("make", "held"),
    [
        (filled_states, "DynamicCache that already holds states"),
        (filled_encoder_decoder, "EncoderDecoderCache that already holds 8 positions"),
        (filled_store, "Store that already holds 3 positions"),
        (filled_by_name, "NamedCache that already holds states"),
    ],
)
def test_a_filled_cache_is_refused(make, held):
    with pytest.raises(UnsupportedModelError, match=held):
        check_empty(make())


@pytest.mark.parametrize(
    "make",
    [
        DynamicCache,
        lambda: DynamicCache(config=MambaConfig(num_hidden_layers=2)),
        lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()),
        Store,
        NamedCache,
        Subclass,
    ],
)
def test_an_empty_cache_is_known_as_one(make):
    cache = make()
    assert is_cache(cache)
    check_empty(cache)


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2),
        (torch.zeros(2), torch.zeros(2)),
        KeyValue(1, 2),
        [1],
        {"key": 1},
        torch.Size([2]),
        1,
        None,
    ],
)
def test_what_is_no_cache(value):
    assert not is_cache(value)


def test_a_cache_that_a_layer_only_reads_stays_unless_gradients_go_through_it(monkeypatch):
    class Reader(Attention):
        _can_checkpoint_with_cache = True

    make = functools.partial(Stack, HANDS["positional"], lambda: store)
    store = types.SimpleNamespace()

    class Kept(Store):
        def update(self, key, value):
            return torch.cat([self.kept[0][0], key], 1), torch.cat([self.kept[0][1], value], 1)

    store = Kept()
    store.kept = [(torch.ones(2, 3, 16), torch.ones(2, 3, 16) * 0.3)]
    batch = {key: value for key, value in padded().items() if key != "attention_mask"}
    model = make()
    model.layers = nn.ModuleList(Reader() for _ in range(2))
    model.make = lambda: store
    assert_as_plain(copy.deepcopy(model), batch)

    store.kept = [(torch.ones(2, 3, 16, requires_grad=True), torch.ones(2, 3, 16))]
    run = prepare(model, bf16=False)
    with pytest.raises(UnsupportedModelError, match="Kept whose tensors have gradients"):
        run.model(**batch)
