"""Kill training at random instants until enough, resume each time, and compare the end with an uninterrupted run.

    python tests/checkpoint/kill.py --kills 200

One process imports everything once and forks a child for each attempt. Writing, syncing and removing are slowed down,
so that a good part of the kills falls into them, while training stands still and while it goes on. After each kill
every visible checkpoint must be whole, none that was there may be missing without a newer one, and hidden leftovers
must not pile up. A run that came to its end, killed as often as it was, must have the bits of the run that never
stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_slideformer import SlideConfig, SlideTrainer
from hf_slideformer.checkpoint import CheckpointCalls, SavedCheckpoint
from hf_slideformer.checkpoint.directory import whole_checkpoints

STEPS, SAVE_STEPS, KEPT = 12, 2, 2
LOOP = ("starting", "training", "saving", "done")
FILES = ("", "writing", "renaming", "removing")
PHASES = (*LOOP, *(f"{activity} while {loop}" for loop in LOOP[:3] for activity in FILES[1:]))


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to train."""

    name: str
    dtype: torch.dtype = torch.float32
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    slide: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    ram_share: float | None = None  # of what the state needs there; the rest goes to disk


_BEST = {
    "eval_strategy": "steps",
    "eval_steps": SAVE_STEPS,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
}
SETTINGS = (
    Setting("fp32"),
    Setting("split masters", torch.bfloat16, {"bf16": True, "gradient_accumulation_steps": 2}),
    Setting("fp32 as split masters, best model", args={"bf16": True, **_BEST}),
    Setting("8-bit moments", torch.bfloat16, {"bf16": True}, {"optimizer_states": "8bit"}),
    Setting("overlapped updates", args={"bf16": True, "max_grad_norm": 0.0}),
    Setting(
        "state on disk",
        args={"bf16": True},
        # Large enough that pages do not decide what fits.
        model={"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 8},
        ram_share=0.75,
    ),
)


class Progress:
    """What a child is doing, in memory that the parent sees."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)

    @property
    def loop(self) -> str:
        """What the main thread does, one of `LOOP`."""
        return LOOP[self._shared[0]]

    @loop.setter
    def loop(self, name: str) -> None:
        self._shared[0] = LOOP.index(name)

    @property
    def files(self) -> str:
        """What is done to files, in whatever thread: one of `FILES`."""
        return FILES[self._shared[1]]

    @files.setter
    def files(self, name: str) -> None:
        self._shared[1] = FILES.index(name)

    @property
    def phase(self) -> str:
        """One of `PHASES`."""
        return f"{self.files} while {self.loop}" if self.files and self.loop != "done" else self.loop

    def start(self) -> None:
        """A child begins."""
        self.loop, self.files = "starting", ""

    @contextlib.contextmanager
    def during(self, name: str):
        """Set what is done to files while the block runs."""
        before = self.files
        self.files = name
        yield
        self.files = before

    def follow(self, trainer: SlideTrainer) -> None:
        """Show what a trainer does."""
        step, rotate = trainer.training_step, trainer._rotate

        def training_step(*args, **kwargs):
            self.loop = "training"
            return step(*args, **kwargs)

        def rotate_and_end(*args):
            rotate(*args)
            self.files = ""

        trainer.training_step, trainer._rotate = training_step, rotate_and_end


class SlowFiles(CheckpointCalls):
    """A disk on which everything takes a while."""

    def __init__(self, progress: Progress, delay_s: float) -> None:
        self._progress = progress
        self._delay_s = delay_s

    def write(self, descriptor: int, data: memoryview) -> int:
        """At most 4 KiB at once."""
        time.sleep(self._delay_s / 4)
        return super().write(descriptor, data[:4096])

    def fsync(self, descriptor: int) -> None:
        """Later."""
        time.sleep(self._delay_s)
        super().fsync(descriptor)

    def make_directory(self, path: Path) -> None:
        """From here on files are written, and training stands still until its next step."""
        self._progress.files = "writing"
        self._progress.loop = "saving"
        super().make_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        """With time before and after it."""
        with self._progress.during("renaming"):
            time.sleep(2 * self._delay_s)
            super().rename(source, target)
            time.sleep(2 * self._delay_s)

    def remove_tree(self, path: Path) -> None:
        """File by file."""
        if not path.exists():
            return
        with self._progress.during("removing"):
            for file in [found for found in path.rglob("*") if found.is_file()]:
                time.sleep(self._delay_s / 2)
                file.unlink()
            super().remove_tree(path)


class Tokens(Dataset):
    """Ten rows: a run goes over them more than once."""

    def __init__(self, count: int, seed: int) -> None:
        self._rows = torch.randint(3, 32, (count, 8), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._rows[index], "labels": self._rows[index]}


def make_trainer(
    setting: Setting,
    output_dir: Path,
    files: CheckpointCalls,
    callbacks: list[TrainerCallback],
    *,
    model_seed: int = 0,
) -> SlideTrainer:
    """A trainer over a tiny llama with dropout."""
    set_seed(model_seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3} | setting.model
    config = LlamaConfig(
        vocab_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        attention_dropout=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **sizes,
    )
    model = LlamaForCausalLM(config).to(setting.dtype)
    model.config.dtype = setting.dtype
    args = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "save_total_limit": KEPT,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 7,
    }

    def trainer_with(**slide: Any) -> SlideTrainer:
        return SlideTrainer(
            model=model,
            args=TrainingArguments(output_dir=str(output_dir), **{**args, **setting.args}),
            train_dataset=Tokens(10, seed=5),
            eval_dataset=Tokens(4, seed=6),
            slide_config=SlideConfig(**slide),
            callbacks=callbacks,
        )

    trainer = trainer_with(**setting.slide)
    if setting.ram_share is not None:
        needed = sum(trainer.slide.plan.peaks["train"][tier] for tier in ("GPU", "RAM"))
        disk = output_dir.parent / "disk"
        disk.mkdir(exist_ok=True)
        trainer = trainer_with(
            **setting.slide, cpu_memory=int(setting.ram_share * needed), nvme_dir=str(disk)
        )
        assert trainer.slide.plan.decisions.on_disk
    trainer._files = files
    return trainer


def final_state(trainer: SlideTrainer) -> dict[str, Any]:
    """Everything that a run ends with, tensors as digests; as it is after a way through JSON."""

    def digest(tensor: torch.Tensor) -> str:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.blake2b(data).hexdigest()}"

    trainer.slide.synchronize()
    engine = trainer.slide.engine
    assert engine is not None
    state: dict[str, Any] = {}
    for states in engine.states_by_unit():
        with engine.state_in_memory(states):
            for param in states:
                parts = {"weight": param.live, "residual": param.residual, **param.moments}
                state[param.name] = {
                    "step": param.step,
                    **{name: digest(value) for name, value in parts.items() if value is not None},
                }
    result = {
        "groups": [
            {key: value for key, value in group.items() if key != "params"}
            for group in trainer.optimizer.param_groups
        ],
        "schedule": trainer.lr_scheduler.state_dict(),
        "random": [digest(torch.get_rng_state()), repr(random.getstate())],
        "history": [
            entry
            for entry in (
                {k: v for k, v in e.items() if "runtime" not in k and "per_second" not in k}
                for e in trainer.state.log_history
            )
            if "train_loss" not in entry
        ],
        "best": [trainer.state.best_metric, trainer.state.best_global_step],
        "state": state,
    }
    return json.loads(json.dumps(result, default=str))


def train(
    setting: Setting, output_dir: Path, files: CheckpointCalls, progress: Progress, result: Path
) -> None:
    """One attempt: go on from the last checkpoint if there is one, and write down the end."""
    last = get_last_checkpoint(str(output_dir)) if output_dir.exists() else None
    # Other random weights than before: whatever is not restored shows.
    trainer = make_trainer(setting, output_dir, files, [], model_seed=0 if last is None else 99)
    progress.follow(trainer)
    trainer.train(resume_from_checkpoint=last)
    progress.loop = "done"
    part = result.with_suffix(".part")
    part.write_text(json.dumps(final_state(trainer)))
    part.rename(result)


def fork(work, log: Path) -> int:
    """Run `work` in a child with its output in `log`; the process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        torch.set_num_threads(1)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(child: int, timeout_s: float, until=lambda: False) -> int | None:
    """The child's exit status, or None if it is still running after the time or at an event."""
    end = time.monotonic() + timeout_s
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        left = end - time.monotonic()
        if left <= 0 or until():
            return None
        time.sleep(min(0.001, left))


def check_directory(output_dir: Path, last_step: int) -> int:
    """Check what a kill left; the last whole checkpoint's step.

    Raises:
        AssertionError: a visible checkpoint is damaged, one is lost, or leftovers pile up.
    """
    if not output_dir.exists():
        assert last_step == 0
        return 0
    visible = sorted(path for path in output_dir.iterdir() if path.name.startswith("checkpoint-"))
    hidden = [path for path in output_dir.iterdir() if path.name.startswith(".")]
    for path in visible:
        saved = SavedCheckpoint(path, CheckpointCalls())
        saved.check_files(saved.records)
    assert sorted(whole_checkpoints(output_dir)) == visible
    assert len(visible) <= KEPT + 1, visible
    assert len(hidden) <= 2, hidden
    step = max((int(path.name.rpartition("-")[2]) for path in visible), default=0)
    assert step >= last_step, f"checkpoint-{last_step} was there, now the last is {step}"
    return step


def _differences(one: Any, two: Any) -> list[Any]:
    """The first pairs that differ."""
    if isinstance(one, dict):
        one, two = list(one.items()), list(two.items())
    return [pair for pair in zip(one, two, strict=False) if pair[0] != pair[1]][:5]


def run(kills: int, seed: int, directory: Path, *, delay_s: float = 0.002, settings=SETTINGS) -> Counter:
    """Kill `kills` times, over runs of all settings in turn; how many kills fell into each phase.

    Raises:
        AssertionError: something was lost, damaged or different.
    """
    chance = random.Random(seed)
    progress, phases = Progress(), Counter()
    files = SlowFiles(progress, delay_s)
    references: dict[str, tuple[dict[str, Any], float, float]] = {}
    number = done = 0
    while done < kills:
        setting = settings[number % len(settings)]
        number += 1
        if setting.name not in references:
            result, start = directory / "reference.json", time.monotonic()
            progress.start()
            log = directory / "reference.log"
            child = fork(
                lambda s=setting, r=result: train(s, directory / "reference", files, progress, r), log
            )
            wait_for(child, 120.0, until=lambda: progress.loop == "training")
            started = time.monotonic()
            assert wait_for(child, 120.0) == 0, log.read_text()
            times = started - start, time.monotonic() - started
            references[setting.name] = json.loads(result.read_text()), *times
            shutil.rmtree(directory / "reference")
        reference, start_s, training_s = references[setting.name]
        output_dir, result, log = (
            directory / f"run-{number}",
            directory / f"{number}.json",
            directory / f"{number}.log",
        )
        last_step = attempts = 0
        while not result.exists():
            progress.start()
            attempts += 1
            child = fork(lambda s=setting, o=output_dir, r=result: train(s, o, files, progress, r), log)
            if done == kills:  # the run may end
                status = wait_for(child, 120.0)
            elif chance.random() < 0.1:  # while it starts
                status = wait_for(child, chance.uniform(0, start_s))
            else:
                status = wait_for(child, 120.0, until=lambda: progress.loop == "training")
                if status is None:
                    status = wait_for(child, chance.uniform(0, 0.7) * training_s)
            if status is None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                assert done < kills, f"{setting.name} hangs\n{log.read_text()}"
                done += 1
                phases[progress.phase] += 1
            else:
                assert status == 0, f"{setting.name}, attempt {attempts}\n{log.read_text()}"
            last_step = check_directory(output_dir, last_step)
            assert attempts < 1000
        ended = json.loads(result.read_text())
        for part, value in reference.items():
            assert ended[part] == value, (
                f"{setting.name}: {part} differs after {attempts} attempts: {_differences(ended[part], value)}"
            )
        assert len(reference["history"]) >= STEPS
        assert not [path for path in output_dir.iterdir() if path.name.startswith(".")]
        shutil.rmtree(output_dir)
        print(f"{done:4} kills; {setting.name}: same end after {attempts} attempts", flush=True)
    return phases


def main() -> None:
    """Read the command line and kill."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--delay-ms", type=float, default=2.0, help="of a sync; other calls in proportion")
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="use the first so many")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        phases = run(
            options.kills,
            options.seed,
            Path(directory),
            delay_s=options.delay_ms / 1000,
            settings=SETTINGS[: options.settings],
        )
    print("kills by phase:", ", ".join(f"{phase} {phases[phase]}" for phase in PHASES if phases[phase]))


if __name__ == "__main__":
    main()
