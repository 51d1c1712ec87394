"""After a device-side assertion the process must end with CUDA's error; confirmed with overlapped updates: it hangs.

UpdateWorker._take queries events outside of any try (update-worker-dies.py); its thread ends, and main, autograd or
the H2D lane wait for its jobs for ever. Two ways: overlapped updates, and gradient sums over micro-batches. An id beyond
the vocabulary is the cause, as with a tokenizer that does not fit the model.
"""

import subprocess
import sys

CHILD = r"""
import sys, warnings
warnings.simplefilter("ignore")
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from hf_slideformer import SlideAdamW, SlideConfig
from hf_slideformer.engine.engine import SlideEngine
from hf_slideformer.engine.model.setup import Setup
overlapped = sys.argv[1] == "overlapped"
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=6,
                                     num_attention_heads=8, num_key_value_heads=4)).to(torch.bfloat16)
engine = SlideEngine(model, Setup(device=torch.device("cuda"), bf16=True, micro_batches=1 if overlapped else 2,
                     config=SlideConfig(placement="stream", update="overlapped" if overlapped else "deferred")),
                     delays={"update": lambda label: 0.2})
optimizer = SlideAdamW(model.parameters(), lr=1e-4)
engine.attach_optimizer(optimizer)
model.train()
for step in range(3):
    for micro in range(1 if overlapped else 2):
        ids = torch.randint(512, (2, 64), device="cuda")
        if step == 2:
            ids = ids + 100_000
        try:
            loss = model(input_ids=ids, labels=ids % 512, use_cache=False).loss
            loss.backward()
        except BaseException as error:
            print("raised:", type(error).__name__, str(error)[:80], flush=True)
            engine.reset()
            raise
    optimizer.step()
    optimizer.zero_grad()
    print("step", step, flush=True)
engine.synchronize()
print(loss.item())
"""
import threading

ok = True
for kind in ("overlapped", "accumulation"):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, kind], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines, second = [], threading.Event()

    def read():
        for line in child.stdout:
            lines.append(line.strip())
            if line.startswith("step 1"):
                second.set()

    threading.Thread(target=read, daemon=True).start()
    second.wait(120)  # imports and two good steps; the third has the bad ids
    try:
        print(kind, ": ended with", child.wait(15), "|", " / ".join(lines[-3:])[-300:])
    except subprocess.TimeoutExpired:
        print(kind, ": still there 15 s after the step before |", " / ".join(lines[-3:])[-300:])
        child.kill()
        ok = False
print("PASS" if ok else "FAIL")
sys.exit(0 if ok else 1)
