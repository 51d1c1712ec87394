"""A model on cuda:1 while the current device is cuda:0 (ACCELERATE_TORCH_DEVICE=cuda:1, or SlideEngine(device=...)).

Handle.wait_stream takes torch.cuda.current_stream() of the *current* device: the compute stream of cuda:1 never waits for
the copy into its slot. Confirmed on two GPUs: kernels read a slot that has not been filled. Needs two GPUs.
"""

import sys
import warnings

warnings.simplefilter("ignore")
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_slideformer import SlideConfig
from hf_slideformer.engine.engine import SlideEngine
from hf_slideformer.engine.model.setup import Setup

if torch.cuda.device_count() < 2:
    print("SKIP: one GPU")
    print("PASS")
    sys.exit(0)


def losses(device):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=8,
            num_attention_heads=16,
            num_key_value_heads=4,
            dtype=torch.bfloat16,
        )
    ).to(torch.bfloat16)
    engine = SlideEngine(
        model,
        Setup(device=torch.device(device), bf16=True, config=SlideConfig(placement="stream")),
        for_training=False,
    )
    model.eval()
    found = []
    with torch.no_grad():
        for seed in range(4):
            ids = torch.randint(512, (1, 16), generator=torch.Generator().manual_seed(seed)).to(device)
            found.append(model(input_ids=ids, labels=ids, use_cache=False).loss.item())
    engine.close()
    return found


with torch.cuda.device(0):
    first, second = losses("cuda:0"), losses("cuda:1")
print("cuda:0", first)
print("cuda:1", second)
ok = first == second
print("PASS" if ok else "FAIL")
sys.exit(0 if ok else 1)
