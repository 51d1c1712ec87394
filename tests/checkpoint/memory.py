"""Peak RAM of saving and of resuming a model of a few hundred million bytes, or more, in a process of its own.

    python tests/checkpoint/memory.py save DIRECTORY [LAYERS]
    python tests/checkpoint/memory.py resume DIRECTORY [LAYERS]
    python tests/checkpoint/memory.py save-experts DIRECTORY
    python tests/checkpoint/memory.py resume-experts DIRECTORY
    python tests/checkpoint/memory.py save,resume DIRECTORY

The experts are fused in memory and saved one by one. Several actions have a forked process each, after one import.
Prints JSON for each: bytes of the state, of the largest unit and its like, and by how much the peak rose: in all, as
was planned, and while weights were loaded.
"""

import json
import os
import sys
import traceback
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
    TrainingArguments,
)

from hf_slideformer import SlideTrainer


class _Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.arange(8) + index
        return {"input_ids": row, "labels": row}


def peak_bytes() -> int:
    """The process's peak of resident memory since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


def reset_peak() -> int:
    """Start again from what is resident now, which is returned."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


class _AtFirstStep(TrainerCallback):
    def __init__(self) -> None:
        self.peak: int | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        """Resuming is over."""
        if self.peak is None:
            self.peak = peak_bytes()


def main() -> None:
    """Take the actions one after the other."""
    actions, directory = sys.argv[1].split(","), Path(sys.argv[2])
    layers = int(sys.argv[3]) if len(sys.argv) > 3 else 10
    if len(actions) == 1:
        measure(actions[0], directory, layers)
        return
    for action in actions:
        child = os.fork()  # nothing has started a thread yet
        if child == 0:
            code = 1
            try:
                measure(action, directory, layers)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if status != 0:
            sys.exit(f"{action} ended with {os.waitstatus_to_exitcode(status)}")


def measure(action: str, directory: Path, layers: int) -> None:
    """Train a step, or resume; measure; print."""
    resumes = action.startswith("resume")
    torch.set_num_threads(2)
    before = reset_peak()
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    sizes = {"vocab_size": 512, "num_hidden_layers": layers, "max_position_embeddings": 64, **heads}
    with torch.device("meta"):
        if action.endswith("experts"):
            model = MixtralForCausalLM(
                MixtralConfig(hidden_size=512, intermediate_size=960, num_local_experts=8, **sizes)
            )
        else:
            model = LlamaForCausalLM(LlamaConfig(hidden_size=1024, intermediate_size=2816, **sizes))
    model = model.to_empty(device="cpu")
    model.init_weights()
    args = TrainingArguments(
        output_dir=str(directory),
        max_steps=2 if resumes else 1,
        per_device_train_batch_size=1,
        save_strategy="no" if resumes else "steps",
        save_steps=1,
        bf16=True,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    first = _AtFirstStep()
    result: dict[str, int] = {}
    trainer = SlideTrainer(model=model, args=args, train_dataset=_Rows(), callbacks=[first])
    if not resumes:
        write_checkpoint = trainer._write_checkpoint
        rise: list[int] = []

        def measured(*arguments) -> None:
            trainer.slide.synchronize()  # the first update touches the moments for the first time
            start = reset_peak()
            write_checkpoint(*arguments)
            trainer._finish_save()
            rise.append(peak_bytes() - start)

        trainer._write_checkpoint = measured
        trainer.train()
        result["rise"] = rise[0]
        peaks_of = trainer.slide.plan.peaks
        result["planned"] = peaks_of["save"]["RAM"] - peaks_of["train"]["RAM"]
    else:
        load = trainer._load_from_checkpoint
        peaks: list[int] = []

        def measured_load(*arguments) -> None:
            peaks.append(peak_bytes())  # of what came before
            start = reset_peak()
            load(*arguments)
            result["weights"] = peak_bytes() - start

        trainer._load_from_checkpoint = measured_load
        trainer.train(resume_from_checkpoint=str(directory / "checkpoint-1"))
        result["rise"] = max(first.peak, *peaks) - before
    engine = trainer.slide.engine
    per_param = 4 + 8  # halves of the master, and moments
    units = engine.states_by_unit()
    result["state"] = per_param * sum(state.spec.numel for state in engine.states)
    result["unit"] = per_param * max(sum(state.spec.numel for state in states) for states in units)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
