"""What a micro-batch costs the update worker, beside the bytes that it has to move; with 16 threads and with one.

Gradients._push_sum adds each gradient, then reads the whole sum again for its sum of squares, although only the last
micro-batch's is used; the first micro-batch is a torch copy_, which has one thread under `accelerate launch`
(OMP_NUM_THREADS=1). Fails if a micro-batch takes more than twice a memory-bound one (10 bytes a parameter at the rate of
the update, 28 bytes a parameter).
"""

import os
import subprocess
import sys

CHILD = r"""
import time, warnings
warnings.simplefilter("ignore")
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from hf_slideformer import SlideAdamW, SlideConfig
from hf_slideformer.engine.engine import SlideEngine
from hf_slideformer.engine.model.setup import Setup
torch.manual_seed(0)
with torch.device("cuda"):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=4096, intermediate_size=14336, num_hidden_layers=4,
        num_attention_heads=32, num_key_value_heads=8, dtype=torch.bfloat16)).to(torch.bfloat16)
model = model.cpu()
engine = SlideEngine(model, Setup(device=torch.device("cuda"), bf16=True, micro_batches=4, config=SlideConfig(placement="stream")))
optimizer = SlideAdamW(model.parameters(), lr=1e-4)
engine.attach_optimizer(optimizer)
params = sum(p.numel() for p in model.model.layers.parameters())
ids = torch.randint(512, (1, 512), device="cuda")
for step in range(3):
    busy = []
    for micro in range(4):
        before = engine.metrics.totals().get("update_s", 0.0)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        busy.append(engine.metrics.totals()["update_s"] - before)
    engine.clip_grad_norm_(model.parameters(), 1.0)
    before = engine.metrics.totals()["update_s"]
    optimizer.step(); optimizer.zero_grad(); engine.synchronize()
    update = engine.metrics.totals()["update_s"] - before
scale = 7e9 / params
print("torch threads %d; worker seconds for 7e9 parameters: micro-batches %s, update %.2f" % (torch.get_num_threads(),
      ["%.2f" % (b * scale) for b in busy], update * scale))
ideal = update * 10 / 28
print("RATIO", max(busy) / ideal)
"""
ok = True
for threads in (None, "1"):
    env = {**os.environ, **({"OMP_NUM_THREADS": threads} if threads else {})}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = done.stdout.strip().splitlines()
    print(f"OMP_NUM_THREADS={threads}:", " | ".join(lines[-2:])[-400:])
    ok = ok and done.returncode == 0 and float(lines[-1].split()[-1]) < 2
print("PASS" if ok else "FAIL")
sys.exit(0 if ok else 1)
