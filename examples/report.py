"""What the demo prints and draws: sections, aligned rows, the course of training, and its picture."""

from __future__ import annotations

import textwrap
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from transformers import PreTrainedModel, TrainerCallback

mpl.use("Agg")  # There may be no display; only a file is written.
from matplotlib.figure import Figure  # noqa: E402

WIDTH = 100
# The engine's counters of time in which the computing thread stood still, in words.
WAITS = {"wait_weights_s": "weights", "wait_gradients_s": "gradients"}


def section(title: str) -> None:
    """Print a heading."""
    print(f"\n{title}\n{'-' * len(title)}", flush=True)


def rows(pairs: dict[str, str]) -> None:
    """Print names and values in two columns."""
    width = max(map(len, pairs), default=0)
    for name, value in pairs.items():
        lines = textwrap.wrap(value, WIDTH - width - 2) or [""]
        print(f"{name:<{width}}  {lines[0]}")
        for line in lines[1:]:
            print(f"{'':<{width}}  {line}")
    print(end="", flush=True)


def size(n_bytes: float) -> str:
    """Write a number of bytes in MiB or GiB."""
    mebibytes = n_bytes / 2**20
    return f"{mebibytes:,.0f} MiB" if mebibytes < 10_000 else f"{mebibytes / 1024:,.1f} GiB"


def plain_placement(model: PreTrainedModel, device: str) -> dict[str, str]:
    """Say where plain Trainer keeps its state: all of it on the one device."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {
        "weights": f"{size(weights):>10}  {device}",
        "gradients": f"{size(weights):>10}  {device}",
        "AdamW moments": f"{size(2 * weights):>10}  {device}",
    }


class Course(TrainerCallback):
    """Prints a line every few steps and keeps the losses for the picture.

    Attributes:
        train: Steps, and the mean training loss since the step before.
        held_out: Steps, and the held-out loss.
        spent: The engine's counters summed over the training steps alone, without the evaluations between.
    """

    def __init__(self, totals: Callable[[], dict[str, float]]):
        """Take `totals`, which returns the engine's counters so far (empty for plain Trainer)."""
        self.train: list[tuple[int, float]] = []
        self.held_out: list[tuple[int, float]] = []
        self.spent: Counter[str] = Counter()
        self._totals = totals
        self._mark(0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Print the table's head and start the clock."""
        print(f"{'step':>7} {'loss':>9} {'held-out':>9} {'grad norm':>10} {'lr':>9} {'s/step':>7}  bound by")
        self._mark(0)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Print a line of training figures."""
        if "loss" not in logs:
            return
        elapsed = time.perf_counter() - self._time
        used = Counter(self._totals())
        used.subtract(self._before)
        self.spent.update(used)
        self.train.append((state.global_step, logs["loss"]))
        print(
            f"{state.global_step:>7} {logs['loss']:>9.4f} {'':>9} {logs.get('grad_norm', float('nan')):>10.3f} "
            f"{logs.get('learning_rate', 0.0):>9.2e} {elapsed / max(1, state.global_step - self._step):>7.2f}  "
            f"{bound_by(used, elapsed)}",
            flush=True,
        )
        self._mark(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Note the held-out loss, and print it if training is under way."""
        point = (state.global_step, metrics["eval_loss"])
        if self.train and point not in self.held_out:
            print(f"{point[0]:>7} {'':>9} {point[1]:>9.4f}", flush=True)
        if point not in self.held_out:
            self.held_out.append(point)
        self._mark(state.global_step)

    def loss_at(self, step: int) -> float | None:
        """Return the held-out loss after `step` steps, if it was taken then."""
        return dict(self.held_out).get(step)

    def _mark(self, step: int) -> None:
        """Start the next interval here, so that an evaluation's time is not taken for the next steps'."""
        self._step, self._time, self._before = step, time.perf_counter(), Counter(self._totals())


def bound_by(used: Mapping[str, float], elapsed: float) -> str:
    """Name what took the largest part of the time: computing, or standing still for something."""
    waits = {word: used.get(key, 0.0) for key, word in WAITS.items()}
    parts = {"compute": elapsed - sum(waits.values())} | waits
    name = max(parts, key=lambda part: parts[part])
    return f"{name} ({parts[name] / elapsed:.0%})"


def draw_loss(course: Course, path: Path, title: str) -> None:
    """Draw training and held-out loss over the steps."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for points, label, style in ((course.train, "training", "-"), (course.held_out, "held-out", "o-")):
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss per answer token (nats)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
