"""RAM while a saved model is loaded and moved to its place: at most the plan, never a second copy."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

MIB = 2**20

# Imports once and forks for each line that it is given, so that each measurement has a process whose memory nothing
# else has touched. Anonymous memory is what counts: pages of the checkpoint's files are the page cache's.
SCRIPT = """
    import json, os, sys, threading, time
    import torch
    from transformers import AutoModelForCausalLM
    from hf_slideformer import SlideAdamW, SlideConfig
    from hf_slideformer.engine.engine import SlideEngine
    from hf_slideformer.engine.model.setup import Setup

    def anonymous():
        for line in open("/proc/self/status"):
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024

    def measure(source, settings, dtype):
        torch.ones(1).add_(1)
        before, peak, done = anonymous(), 0, threading.Event()

        def watch():
            nonlocal peak
            while not done.is_set():
                peak = max(peak, anonymous())
                time.sleep(0.001)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
        loaded = anonymous() - before
        engine = SlideEngine(model, Setup(device=torch.device("cpu"), bf16=True, config=SlideConfig(**settings)))
        done.set()
        watcher.join()
        print(json.dumps({
            "peak": peak - before, "loaded": loaded, "after": anonymous() - before,
            "planned": engine.plan.peaks["load"], "disk": engine.disk_bytes,
        }), flush=True)
        engine.close()  # nothing else ends its threads and files in a forked process

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                measure(*json.loads(line))
                os._exit(0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                sys.stderr.flush()
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(1)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """256 MiB of bf16 weights in shards of 64 MB, most of them in units."""
    path = tmp_path_factory.mktemp("checkpoint")
    set_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path, max_shard_size="64MB")
    return path


@pytest.fixture(scope="module")
def measure():
    """Measure loading a checkpoint with settings in a dtype: bytes, by name."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def ask(checkpoint, settings, dtype):
        process.stdin.write(json.dumps([str(checkpoint), settings, dtype]) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        while line and not line.startswith('{"'):
            line = process.stdout.readline()
        assert line, "the process failed; what it said is in the captured output"
        return json.loads(line)

    yield ask
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    process.stdout.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_takes_what_is_planned(checkpoint, dtype, measure):
    found = measure(checkpoint, {}, dtype)
    weights = 8 * (4 * 1024 * 1024 + 3 * 1024 * 4096) * 2
    planned = found["planned"]["RAM"] + found["planned"]["GPU"]
    assert found["peak"] <= planned + 32 * MIB, found
    assert found["peak"] >= weights, "the weights are there"
    if dtype == "bfloat16":
        assert found["loaded"] < weights / 4, "weights stayed in their files until they were moved"


def test_state_that_goes_to_disk_was_never_whole_in_ram(checkpoint, tmp_path, measure):
    """Residuals of fp32 weights are written while the model moves."""
    found = measure(checkpoint, {"nvme_dir": str(tmp_path), "cpu_memory": "1400MB"}, "float32")
    assert found["disk"] > 1_000 * MIB
    assert found["peak"] <= found["planned"]["RAM"] + found["planned"]["GPU"] + 32 * MIB, found


def test_a_model_larger_than_ram_goes_from_file_to_disk(tmp_path, measure):
    """Many small layers: what two of them need on their way is much less than all weights."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=32,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    saved = tmp_path / "checkpoint"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(saved, max_shard_size="64MB")
    weights = 32 * (4 * 512 * 512 + 3 * 512 * 2048) * 2
    found = measure(saved, {"nvme_dir": str(tmp_path), "cpu_memory": "220MB"}, "bfloat16")
    assert found["disk"] >= 7 * weights, "all state, weights and gradients"
    assert found["peak"] <= found["planned"]["RAM"] + found["planned"]["GPU"] + 32 * MIB, found
    assert found["peak"] < weights / 2, found
