"""Tiny random-weight models of every family that the parity tests cover.

Each entry is small enough that twenty optimizer steps take about a second on one CPU core, and keeps what makes
its family hard to stream: sliding windows, soft caps, sinks, fused experts with an auxiliary loss, dropout, an
encoder whose output every decoder layer reads, layers that are skipped at random.

Weights are drawn wider than a checkpoint's (``initializer_range`` 0.1 and more) so that the gradients' global norm
starts above 1: a test of clipping in which nothing is clipped cannot fail.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 128
"""Token ids of all models; 0 pads, 1 begins, 2 ends, 3 starts decoding."""

PAD, BOS, EOS, DECODER_START = 0, 1, 2, 3

_TOKENS = dict(vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)

_DECODER = dict(
    **_TOKENS,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    initializer_range=0.15,
    tie_word_embeddings=False,
)
"""What the llama-shaped configurations share."""


@dataclass(frozen=True)
class ModelSpec:
    """How to build one tiny model, and what its parity test has to know.

    Attributes:
        config_class: name of the configuration class in transformers.
        model_class: name of the model class in transformers.
        config: arguments of the configuration.
        task: "causal", "classification" or "seq2seq"; selects data and collator.
        zero_gradient: patterns of parameters (or of a part of one, see ``zero_gradient_part``) whose true gradient
            is zero, so that what autograd returns is rounding noise.
        zero_gradient_part: picks the affected part of a matching parameter.
    """

    config_class: str
    model_class: str
    config: Mapping[str, Any]
    task: str = "causal"
    zero_gradient: tuple[str, ...] = ()
    zero_gradient_part: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda tensor: tensor)

    def has_zero_gradient(self, name: str) -> bool:
        """Whether parameter ``name`` has (in part) no true gradient."""
        return any(re.search(pattern, name) for pattern in self.zero_gradient)


def _middle_third(qkv_bias: torch.Tensor) -> torch.Tensor:
    """The key part, a view, of a fused query-key-value bias (gpt2's ``c_attn.bias``)."""
    return qkv_bias.chunk(3)[1]


_MOE = dict(
    num_experts_per_tok=2,
    output_router_logits=True,
    # A hundred times the usual coefficient: at the usual one a lost auxiliary gradient hides below the tolerance.
    router_aux_loss_coef=0.1,
)

_BART = dict(
    **_TOKENS,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    max_position_embeddings=64,
    dropout=0.1,
    attention_dropout=0.1,
    activation_dropout=0.1,
    init_std=0.15,
    decoder_start_token_id=DECODER_START,
    forced_eos_token_id=None,
)

MODELS: dict[str, ModelSpec] = {
    "llama": ModelSpec("LlamaConfig", "LlamaForCausalLM", _DECODER),
    "qwen2": ModelSpec("Qwen2Config", "Qwen2ForCausalLM", _DECODER),
    "qwen3": ModelSpec("Qwen3Config", "Qwen3ForCausalLM", _DECODER),
    # The window is shorter than most samples, so the sliding mask differs from the causal one.
    "mistral": ModelSpec("MistralConfig", "MistralForCausalLM", {**_DECODER, "sliding_window": 6}),
    "gemma2": ModelSpec(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        # Eager, because scaled_dot_product_attention has no soft cap.
        {
            **_DECODER,
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
            "num_hidden_layers": 4,
            "attn_implementation": "eager",
        },
    ),
    "gemma3_text": ModelSpec(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            **_DECODER,
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ModelSpec("Phi3Config", "Phi3ForCausalLM", _DECODER),
    "olmo2": ModelSpec("Olmo2Config", "Olmo2ForCausalLM", _DECODER),
    "gpt_oss": ModelSpec(
        "GptOssConfig",
        "GptOssForCausalLM",
        {**_DECODER, **_MOE, "sliding_window": 6, "num_local_experts": 4, "intermediate_size": 32},
    ),
    "mixtral": ModelSpec(
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_DECODER, **_MOE, "num_local_experts": 4, "sliding_window": None},
    ),
    "qwen3_moe": ModelSpec(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        # The first layer is dense: not all units of one model have the same parameters.
        {**_DECODER, **_MOE, "num_experts": 4, "moe_intermediate_size": 32, "mlp_only_layers": [0]},
    ),
    "gpt2": ModelSpec(
        "GPT2Config",
        "GPT2LMHeadModel",
        dict(
            **_TOKENS,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=64,
            initializer_range=0.15,
            resid_pdrop=0.1,
            embd_pdrop=0.1,
            attn_pdrop=0.1,
        ),
        # Softmax does not see a constant added to all its inputs, so without rotary embeddings a key bias is free.
        zero_gradient=(r"c_attn\.bias$",),
        zero_gradient_part=_middle_third,
    ),
    "bert": ModelSpec(
        "BertConfig",
        "BertForSequenceClassification",
        dict(
            vocab_size=VOCAB,
            pad_token_id=PAD,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.15,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
            num_labels=3,
        ),
        task="classification",
        zero_gradient=(r"attention\.self\.key\.bias$",),
    ),
    "t5": ModelSpec(
        "T5Config",
        "T5ForConditionalGeneration",
        dict(
            vocab_size=VOCAB,
            pad_token_id=PAD,
            eos_token_id=EOS,
            decoder_start_token_id=DECODER_START,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            dropout_rate=0.1,
            initializer_factor=1.0,
        ),
        task="seq2seq",
    ),
    "bart": ModelSpec(
        "BartConfig",
        "BartForConditionalGeneration",
        _BART,
        task="seq2seq",
        zero_gradient=(r"k_proj\.bias$",),
    ),
    # Layers are skipped at random: they run in another order than their index, and some steps leave a layer without
    # gradients (its parameters must then be neither decayed nor counted as stepped).
    "bart_layerdrop": ModelSpec(
        "BartConfig",
        "BartForConditionalGeneration",
        {**_BART, "encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5},
        task="seq2seq",
        zero_gradient=(r"k_proj\.bias$",),
    ),
}


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """Build the model ``name`` with weights that depend only on ``seed`` and the configuration.

    Args:
        name: key of `MODELS`.
        seed: seeds torch's generator, which is left advanced.
        dtype: floating dtype of the parameters. Buffers keep fp32, as `from_pretrained` leaves them.
        overrides: replace arguments of the configuration.
    """
    spec = MODELS[name]
    config = getattr(transformers, spec.config_class)(**{**spec.config, **overrides})
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, spec.model_class)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                # Initial norms and biases are all ones or zeros; spread them so that none is a special value.
                parameter.add_(torch.empty_like(parameter).uniform_(-0.1, 0.1))
            parameter.data = parameter.data.to(dtype)
    return model
