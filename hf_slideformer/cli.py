"""The `slideformer` command. Each subcommand is a function that parses, one that runs, and what it prints.

Exit codes: 0 done; 1 it failed; 2 the arguments cannot be used; 3 the model does not fit. Errors are one line on
stderr. What a subcommand needs is imported when it runs, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import SlideConfig, parse_bytes
from .errors import (
    ConfigError,
    PlanError,
    SlideFormerError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from torch import nn

    from .engine.model.batch_shape import BatchShape
    from .engine.model.blueprint import Blueprint
    from .engine.model.setup import Setup
    from .engine.planning import Planned
    from .machine.hardware import Hardware
    from .optim.rule import UpdateRule
    from .planner.plan import Plan
    from .planner.workload import Budgets, Workload

EXIT_OK, EXIT_FAILED, EXIT_BAD_ARGUMENTS, EXIT_DOES_NOT_FIT = 0, 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: without the program's name; None takes those of this process.

    Returns:
        The exit code. Arguments that argparse refuses, and `--help`, end the process as argparse does.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # argparse cannot hand on options that come before the first positional argument.
    options = make_parser().parse_args(given[:1] if given[:1] == ["launch"] else given)
    options.rest = given[1:]
    try:
        return options.run(options)
    except (ConfigError, UnsupportedModelError) as error:
        return _failed(error, EXIT_BAD_ARGUMENTS)
    except (SlideFormerError, OSError) as error:
        return _failed(error, EXIT_FAILED)
    except EOFError:
        return _failed(ConfigError("the answers ended early; give flags, or --defaults"), EXIT_BAD_ARGUMENTS)
    except KeyboardInterrupt:
        return 130  # what shells report for SIGINT


def make_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each sets `run`, which takes the options and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="slideformer",
        description="Full-parameter fine-tuning of models whose training state is larger than the GPU.",
    )
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    _add_plan(subcommands)
    _add_probe(subcommands)
    _add_config(subcommands)
    _add_launch(subcommands)
    return parser


def _failed(error: Exception, code: int) -> int:
    print(f"slideformer: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


# -- slideformer plan --------------------------------------------------------------------------------------------------


def _add_plan(subcommands: argparse._SubParsersAction) -> None:
    parser = subcommands.add_parser(
        "plan",
        help="say whether a model fits, where everything would live, and how fast it would train",
        description="Plan the training of a model from its configuration alone: no weights are loaded, nothing runs on "
        "a GPU. Exit code 3 if it does not fit.",
    )
    parser.add_argument("model", metavar="MODEL", help="a directory, a config.json, or a hub id")
    parser.add_argument(
        "--seq-len",
        metavar="N",
        help="tokens of the longest sequence (default: 4096, or what the model can take if that is less)",
    )
    parser.add_argument(
        "--batch-size", metavar="N", default="1", help="sequences of a micro-batch (default: 1)"
    )
    parser.add_argument("--grad-accum", metavar="N", default="1", help="micro-batches of a step (default: 1)")
    parser.add_argument(
        "--max-grad-norm", metavar="X", default="1.0", help="0 for no clipping (default: 1.0)"
    )
    machine = parser.add_argument_group("the machine (default: this one)")
    machine.add_argument(
        "--hardware",
        metavar="NAME",
        help="a preset such as rtx4090-128gb, or a file that `slideformer probe` wrote",
    )
    machine.add_argument("--gpu", metavar="SIZE", help="GPU memory that may be used, such as 24GiB")
    machine.add_argument("--ram", metavar="SIZE", help="RAM that may be used")
    machine.add_argument(
        "--nvme",
        metavar="SIZE",
        help="disk for state that exceeds RAM, such as 2TB (default: none)",
    )
    optimizer = parser.add_argument_group("the optimizer, as in TrainingArguments")
    optimizer.add_argument(
        "--optim",
        metavar="adamw_torch|lion_32bit|sgd",
        default="adamw_torch",
        help="default: adamw_torch",
    )
    optimizer.add_argument(
        "--optim-args",
        metavar="NAME=VALUE,...",
        help="such as momentum=0.9, without which SGD keeps no state",
    )
    settings = parser.add_argument_group("settings, as in SlideConfig")
    settings.add_argument(
        "--optimizer-states",
        metavar="fp32|8bit",
        default="fp32",
        help="format of AdamW's moments (default: fp32)",
    )
    settings.add_argument("--placement", metavar="auto|stream", default="auto", help="default: auto")
    settings.add_argument(
        "--activations", metavar="auto|keep|recompute|offload", default="auto", help="default: auto"
    )
    settings.add_argument(
        "--dtype", metavar="bf16|fp32", default="bf16", help="of the weights and of computing (default: bf16)"
    )
    settings.add_argument("--liger", action="store_true", help="plan for use_liger_kernel=True")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> int:
    wanted = _Training.of(options)
    with _quiet():
        return _plan_quietly(options, wanted)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Retries and deprecations would bury the one line that says what is wrong."""
    import transformers

    hub = logging.getLogger("huggingface_hub")
    before = transformers.logging.get_verbosity(), hub.level
    transformers.logging.set_verbosity_error()
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before[0])
        hub.setLevel(before[1])


def _plan_quietly(options: argparse.Namespace, wanted: _Training) -> int:
    from .engine.planning import plan_for

    asked = _Asked.of(options, wanted)
    try:
        planned = plan_for(
            asked.model,
            asked.blueprint,
            asked.setup,
            liger=asked.liger,
            hardware=asked.hardware,
            budgets=asked.budgets,
        )
    except PlanError as error:
        return _refuse(asked, error, as_json=options.json)
    if wanted.nvme is not None and not planned.plan.decisions.on_disk:
        asked.notes.append("it fits without a disk")
    plan = replace(planned.plan, notes=(*planned.plan.notes, *asked.notes))
    advice = _advice(asked, planned)
    if options.json:
        print(json.dumps({"fits": True, **asked.as_dict(), **plan.as_dict(), "advice": advice}, indent=2))
    else:
        print("\n".join([*asked.lines(), plan_report(plan), *(f"  advice: {line}" for line in advice)]))
    return EXIT_OK


@dataclass(frozen=True, slots=True, kw_only=True)
class _Training:
    """The training that is to be planned, and sizes of the machine in bytes; checked before anything is loaded."""

    settings: SlideConfig
    gpu: int | None
    ram: int | None
    nvme: int | None
    batch_size: int
    micro_batches: int
    max_grad_norm: float
    bf16: bool
    liger: bool
    optim: str
    optim_args: str | None

    @classmethod
    def of(cls, options: argparse.Namespace) -> _Training:
        gpu, ram, nvme = (_size(f"--{name}", getattr(options, name)) for name in ("gpu", "ram", "nvme"))
        if options.dtype not in ("bf16", "fp32"):
            raise ConfigError(f"--dtype must be bf16 or fp32, got {options.dtype!r}")
        settings = SlideConfig(
            gpu_memory=gpu,
            cpu_memory=ram,
            placement=options.placement,
            activations=options.activations,
            optimizer_states=options.optimizer_states,
            seq_len=None if options.seq_len is None else _count("--seq-len", options.seq_len),
        )
        return cls(
            settings=settings,
            gpu=gpu,
            ram=ram,
            nvme=nvme,
            batch_size=_count("--batch-size", options.batch_size),
            micro_batches=_count("--grad-accum", options.grad_accum),
            max_grad_norm=_norm(options.max_grad_norm),
            bf16=options.dtype == "bf16",
            liger=options.liger,
            optim=options.optim,
            optim_args=options.optim_args,
        )

    @property
    def dtype(self) -> str:
        return "bf16" if self.bf16 else "fp32"

    def rule(self) -> UpdateRule:
        """How parameters would be updated; which numbers it is given does not matter to a plan."""
        from .optim import check_name

        numbers = {"learning_rate": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
        kind = check_name(self.optim)
        given = kind.arguments_of(argparse.Namespace(optim_args=self.optim_args, **numbers))
        return kind.rule_for([given], self.settings.optimizer_states)

    @property
    def wishes(self) -> dict[str, str]:
        """What the planner may not decide."""
        return {"placement": self.settings.placement, "activations": self.settings.activations}


def _size(flag: str, text: str | None) -> int | None:
    try:
        return None if text is None else parse_bytes(text)
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from None


def _count(flag: str, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise ConfigError(f"{flag} must be a positive whole number, got {text!r}")
    return value


def _norm(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise ConfigError(f"--max-grad-norm must be a number, 0 for no clipping, got {text!r}")
    return value


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Asked:
    """Everything that a plan is made from."""

    source: str
    training: _Training
    hardware: Hardware
    budgets: Budgets
    model: nn.Module
    blueprint: Blueprint
    setup: Setup
    shape: BatchShape
    notes: list[str]

    @property
    def liger(self) -> dict[str, bool] | None:
        """What Trainer would hand to Liger Kernel: our loss head is used where it can be."""
        from .engine.model.head import liger_settings

        if not self.training.liger:
            return None
        return liger_settings(fuses_loss=self.blueprint.head.module is not None)

    @classmethod
    def of(cls, options: argparse.Namespace, training: _Training) -> _Asked:
        import torch
        from transformers.utils import is_liger_kernel_available

        from .engine.model.batch_shape import DEFAULT_SEQ_LEN, BatchShape, max_positions
        from .engine.model.blueprint import Blueprint
        from .engine.model.setup import Setup
        from .engine.model.source import load_config, model_without_data

        rule = training.rule()
        hardware, budgets, notes = _machine(options.hardware, training)
        trust = options.trust_remote_code
        config = load_config(options.model, trust_remote_code=trust)
        dtype = torch.bfloat16 if training.bf16 else torch.float32
        model = model_without_data(config, dtype=dtype, trust_remote_code=trust)
        if getattr(config, "quantization_config", None) is not None:
            notes.append(f"the checkpoint is quantized; this plan is for its weights in {training.dtype}")
        if training.liger and not is_liger_kernel_available():
            notes.append(
                "Liger Kernel is not installed here, so activations and the loss are those of transformers' own "
                "layers, which need more memory; for a closer plan: pip install liger-kernel"
            )
        longest = max_positions(config)
        seq_len = training.settings.seq_len or min(DEFAULT_SEQ_LEN, longest or DEFAULT_SEQ_LEN)
        if longest is not None and seq_len > longest:
            notes.append(
                f"the model says that it takes {longest:,} tokens at most; the plan is for {seq_len:,}"
            )
        said = "as --seq-len says" if training.settings.seq_len else "the default of --seq-len"
        shape = BatchShape(training.batch_size, seq_len, f"sequences of up to {seq_len:,} tokens, {said}")
        setup = Setup(
            device=torch.device("cuda" if hardware.gpu else "cpu"),
            bf16=training.bf16,
            config=training.settings,
            micro_batches=training.micro_batches,
            overlap_is_exact=training.max_grad_norm == 0 and training.micro_batches == 1,
            shape=shape,
            rule=rule,
        )
        blueprint = Blueprint.of(model, setup)
        if getattr(config, "dtype", None) == dtype:
            # `from_pretrained` maps such weights; fused experts, which have three dimensions, it makes anew.
            mapped = {spec.name for spec in blueprint.specs.values() if len(spec.shape) <= 2}
            blueprint = replace(blueprint, mapped=frozenset(mapped))
        return cls(
            source=options.model,
            training=training,
            hardware=hardware,
            budgets=budgets,
            model=model,
            blueprint=blueprint,
            setup=setup,
            shape=shape,
            notes=notes,
        )

    def workload(self) -> Workload:
        """What the planner is asked about, where there is a GPU."""
        from .engine.planning import profiler

        profile_for = profiler(
            self.model,
            self.blueprint,
            self.setup,
            seq_len=self.shape.seq_len,
            liger=self.liger,
        )
        return self.blueprint.workload(profile_for(self.training.batch_size), training=True)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "model": {
                "source": self.source,
                "class": type(self.model).__name__,
                "parameters": self.parameters,
                "dtype": self.training.dtype,
            },
            "hardware": self.hardware.as_dict(),
        }

    @property
    def parameters(self) -> int:
        return sum(param.numel() for param in self.model.parameters())

    def lines(self) -> list[str]:
        """The headline, and what it was planned for."""
        from .memory.layout import MOMENT_FORMATS
        from .optim.rule import described

        rule = self.setup.update_rule
        state = f"{rule.format.name} moments" if rule.format.name in MOMENT_FORMATS else described(rule)
        hardware, training = self.hardware, self.training
        memory = f"{_gib(hardware.ram_bytes)} of RAM"
        if hardware.gpu:
            memory = f"{_gib(hardware.gpu_bytes)} of GPU memory, {memory}"
        elif training.gpu is not None:
            memory += f", of which {_gib(hardware.gpu_bytes)} stand in for a GPU"
        batch = f"micro-batches of {training.batch_size:,} x {self.shape.seq_len:,} tokens"
        if training.micro_batches > 1:
            batch += f", {training.micro_batches:,} a step"
        clipping = f"clipping at {training.max_grad_norm:g}" if training.max_grad_norm else "no clipping"
        count = self.parameters
        size = f"{count / 1e9:,.2f} B" if count >= 1e8 else f"{count / 1e6:,.2f} M"
        return [
            f"{self.source} ({type(self.model).__name__}, {size} parameters, {training.dtype}) on {hardware.name} "
            f"({hardware.source})",
            f"  {memory}; {batch}; {clipping}; {state}",
        ]


def _machine(name: str | None, training: _Training) -> tuple[Hardware, Budgets, list[str]]:
    """The machine with the sizes that were asked for, what may be used of it, and what to say about it."""
    import torch

    from .engine.model.setup import Setup
    from .engine.planning import find_budgets
    from .machine.probe import hardware_of_this_machine, named_hardware
    from .planner.workload import Budgets

    notes = list[str]()
    if name is not None:
        hardware = named_hardware(name)
        there = Budgets(gpu=hardware.gpu_bytes, ram=hardware.ram_bytes)
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        hardware = hardware_of_this_machine(device)
        there = find_budgets(Setup(device=device, bf16=True))
        for flag, size, free in (
            ("--gpu", training.gpu if hardware.gpu else None, there.gpu),
            ("--ram", training.ram, there.ram),
        ):
            if size is not None and size > free:
                notes.append(f"{flag} is more than the {_gib(free)} that are free on this machine")
    notes += hardware.notes
    ram = training.ram or there.ram
    # Without a GPU, RAM stands in for it.
    gpu = training.gpu or (there.gpu if hardware.gpu else ram)
    disk = training.nvme or hardware.disk_bytes
    hardware = replace(hardware, gpu_bytes=gpu, ram_bytes=ram, disk_bytes=disk)
    return hardware, Budgets(gpu=gpu, ram=ram, disk=training.nvme), notes


def plan_report(plan: Plan) -> str:
    """A plan as lines for people: what each tier holds, the peaks of all phases, the prediction, notes."""
    from .planner.plan import format_bytes
    from .planner.timeline import COMPUTE

    lines = [str(replace(plan, notes=(), prediction=None))]
    tiers = ("GPU", "RAM", "disk") if plan.decisions.on_disk else ("GPU", "RAM")
    lines.append(" ".join([f"  {'peaks':<34}", *(f"{tier:>15}" for tier in tiers)]))
    for phase, peak in plan.peaks.items():
        lines.append(" ".join([f"    {phase:<32}", *(f"{format_bytes(peak[tier]):>15}" for tier in tiers)]))
    if plan.prediction is not None:
        told = plan.prediction
        lines.append(
            f"  predicted: {told.tokens_per_s:,.0f} tokens/s, {told.step_s:.2f} s a step, bound by {told.bound_by}"
        )
        waits = [
            f"{seconds:.2f} s for {resource}"
            for resource, seconds in sorted(told.waits_s.items(), key=lambda entry: -entry[1])
            if seconds >= 0.005
        ]
        waiting = f"; in a step it waits {', '.join(waits)}" if waits else ""
        lines.append(f"    the GPU computes {told.busy_s[COMPUTE]:.2f} s{waiting}")
    lines += [f"  note: {note}" for note in plan.notes]
    return "\n".join(lines)


def _advice(asked: _Asked, planned: Planned) -> list[str]:
    """What would be faster; each was tried."""
    from .planner.solve import advise

    if planned.profile is None:
        return [
            "nothing is said of time, because this machine has no GPU; --hardware plans for one that has "
            "(rtx4090-128gb, h100, ...)"
        ]
    return list(
        advise(
            planned.workload,
            asked.hardware,
            asked.budgets,
            profile_for=planned.profile_for,
            **asked.training.wishes,
        )
    )


def _refuse(asked: _Asked, error: PlanError, *, as_json: bool) -> int:
    """Say that it does not fit, what is missing and what would help."""
    message = " ".join(str(error).split())
    if as_json:
        print(json.dumps({"fits": False, **asked.as_dict(), "error": message}, indent=2))
        return EXIT_DOES_NOT_FIT
    lines = [*asked.lines(), "It does not fit."]
    lines += [f"  {sentence}" for sentence in re.split(r"(?<=\.) (?=[A-Z])", message)]
    print("\n".join(lines))
    return EXIT_DOES_NOT_FIT


# -- slideformer probe -------------------------------------------------------------------------------------------------


def _add_probe(subcommands: argparse._SubParsersAction) -> None:
    parser = subcommands.add_parser(
        "probe",
        help="measure this machine",
        description="Measure in seconds what this machine can do: links, memory, updates, matrix products, disk. The "
        "result is kept and used for plans. Nothing else should run meanwhile.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--dir", metavar="DIR", help="measure the disk under this directory too (up to 1 GiB is written)"
    )
    parser.add_argument("--output", metavar="FILE", help="write the JSON to this file as well")
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument("--refresh", action="store_true", help="measure again even if a measurement was kept")
    cache.add_argument("--no-cache", action="store_true", help="measure, and neither read nor keep a result")
    parser.set_defaults(run=_probe)


def _probe(options: argparse.Namespace) -> int:
    import torch

    from .machine.hardware import cache_hardware, cached_hardware
    from .machine.probe import probe

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kept = None
    if not options.refresh and not options.no_cache:
        kept = cached_hardware(device, options.dir)
        if kept is not None and options.dir is not None and kept.disk_read is None:
            kept = None  # that disk was not measured
    if kept is not None:
        print("Measured earlier; --refresh measures again.", file=sys.stderr)
        hardware = kept
    else:
        print("Measuring for some seconds ...", file=sys.stderr)
        hardware = probe(device, options.dir)
        if not options.no_cache and cache_hardware(hardware, device, options.dir) is None:
            print("The result could not be kept in the user's cache directory.", file=sys.stderr)
    description = json.dumps(hardware.as_dict(), indent=2)
    if options.output is not None:
        Path(options.output).write_text(description + "\n", encoding="utf-8")
    print(description if options.json else hardware_table(hardware))
    return EXIT_OK


def hardware_table(hardware: Hardware) -> str:
    """What a machine can do, as lines for people: GiB of memory, and rates with decimal units."""
    there = "GPU" if hardware.gpu else "stand-in for a GPU"
    rows = [
        (
            "GPU",
            f"{hardware.gpu}, {_gib(hardware.gpu_bytes)}" if hardware.gpu else "none: RAM and cores stand in",
        ),
        ("RAM that may be used", _gib(hardware.ram_bytes)),
        ("physical cores", str(hardware.cores)),
        (f"RAM to {there}", _rate(hardware.h2d, "GB/s")),
        (f"{there} to RAM", _rate(hardware.d2h, "GB/s")),
        ("both at once, in all", _rate(hardware.duplex, "GB/s")),
        ("copy in RAM, read and written", _rate(hardware.ram_copy, "GB/s")),
    ]
    if hardware.gpu:
        rows.append(("copy in GPU memory, read and written", _rate(hardware.gpu_copy, "GB/s")))
    adamw = {"fp32": ("AdamW", ", fp32 moments"), "8bit": ("AdamW", ", 8-bit moments")}
    for key in {**hardware.cpu_update, **hardware.cpu_update_loaded, **hardware.gpu_update}:
        rule, moments = adamw.get(key, (key, ""))
        for rates, row in (
            (hardware.cpu_update, f"{rule} on the CPU{moments}"),
            (hardware.cpu_update_loaded, "  beside copies both ways"),
            (hardware.gpu_update if hardware.gpu else {}, f"{rule} on the GPU{moments}"),
        ):
            if key in rates:
                rows.append((row, _rate(rates[key], "Gparam/s")))
    rows.append(("bf16 matrix products", _rate(hardware.bf16_flops, "TFLOP/s")))
    rows.append(("fp32 matrix products", _rate(hardware.fp32_flops, "TFLOP/s")))
    if hardware.disk_bytes is not None:
        rows.append(("disk, free", _gib(hardware.disk_bytes)))
    if hardware.disk_read is not None:
        rows.append(("disk, reading", _rate(hardware.disk_read, "GB/s")))
    if hardware.disk_write is not None:
        rows.append(("disk, writing", _rate(hardware.disk_write, "GB/s")))
    if hardware.disk_duplex is not None:
        rows.append(("disk, both at once", _rate(hardware.disk_duplex, "GB/s")))
    width = max(len(label) for label, _ in rows)
    lines = [
        f"{hardware.name} ({hardware.source})",
        *(f"  {label:<{width}}  {value}" for label, value in rows),
    ]
    lines += [f"  note: {note}" for note in (*hardware.notes, *filter(None, [hardware.advice]))]
    return "\n".join(lines)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.1f} GiB"


def _rate(value: float, unit: str) -> str:
    """A rate with three figures or so, and more only before the decimal point."""
    scaled = value / (1e12 if unit == "TFLOP/s" else 1e9)
    decimals = 0 if scaled >= 100 else 1 if scaled >= 10 else 2 if scaled >= 1 else 3
    return f"{scaled:,.{decimals}f} {unit}"


# -- slideformer launch, slideformer config ----------------------------------------------------------------------------


def _add_launch(subcommands: argparse._SubParsersAction) -> None:
    parser = subcommands.add_parser(
        "launch",
        add_help=False,  # Accelerate's own parser has the options
        help="run a plain Accelerate script, streamed; takes the options of `accelerate launch`",
    )
    parser.set_defaults(run=_launch)


def _launch(options: argparse.Namespace) -> int:
    from .launch import launch

    return launch(options.rest)


def _add_config(subcommands: argparse._SubParsersAction) -> None:
    parser = subcommands.add_parser(
        "config",
        help="write a configuration for `accelerate launch` with a section for slideformer",
        description="Write a configuration for `accelerate launch` and `slideformer launch`. Without a flag that says "
        "what to write, it asks.",
    )
    parser.add_argument(
        "--config_file",
        "--config-file",
        metavar="FILE",
        help="where to write; .json for JSON, else YAML (default: Accelerate's own default, which its launch finds)",
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")
    parser.add_argument("--defaults", action="store_true", help="write the defaults without asking")
    parser.add_argument(
        "--mixed_precision", "--mixed-precision", choices=("bf16", "no"), help="default: bf16"
    )
    parser.add_argument("--cpu", action="store_true", help="train on the CPU though there may be a GPU")
    settings = parser.add_argument_group("settings, as in SlideConfig")
    for field in fields(SlideConfig):
        flag = field.name.replace("_", "-")
        settings.add_argument(f"--{flag}", metavar="VALUE", help=f"default: {field.default}")
    parser.set_defaults(run=_config)


def _config(options: argparse.Namespace) -> int:
    from .launch import write_configuration

    settings = {
        field.name: _setting(field.name, value)
        for field in fields(SlideConfig)
        if (value := getattr(options, field.name)) is not None
    }
    precision = options.mixed_precision
    if not settings and precision is None and not options.cpu and not options.defaults:
        precision, settings = _questions()
    path = write_configuration(
        options.config_file,
        settings,
        mixed_precision=precision or "bf16",
        use_cpu=options.cpu,
        replace=options.force,
    )
    print(f"Written to {path}. Run a script with:")
    named = "" if options.config_file is None else f"--config_file {path} "
    print(f"  accelerate launch {named}train.py")
    return EXIT_OK


def _setting(name: str, text: str) -> Any:
    """A flag's text as the value that a configuration holds; what it means is for `SlideConfig` to say."""
    if name in ("seq_len", "cpu_threads", "trace_steps"):
        try:
            return int(text)
        except ValueError:
            raise ConfigError(f"{name} must be a whole number, got {text!r}") from None
    return text


def _questions() -> tuple[str, dict[str, Any]]:
    """The precision and the settings that somebody answers with; empty answers stand for the defaults."""
    precision = _ask("Precision, bf16 or no (fp32)", "bf16", lambda text: _one_of(text, ("bf16", "no")))
    settings: dict[str, Any] = {}
    for name, question, default in (
        ("gpu_memory", "GPU memory that may be used, such as 24GiB", "all"),
        ("cpu_memory", "RAM that may be used, such as 100GiB", "all that is free"),
        ("nvme_dir", "Directory on an NVMe drive for state that exceeds RAM", "none"),
        (
            "optimizer_states",
            "AdamW's moments: fp32 (exact) or 8bit (half the memory, other numbers)",
            "fp32",
        ),
    ):
        answer = _ask(question, default, functools.partial(_checked, name))
        if answer != default:
            settings[name] = answer
    return precision, settings


def _ask(question: str, default: str, check: Callable[[str], str]) -> str:
    while True:
        answer = input(f"{question} [{default}]: ").strip()
        try:
            return check(answer) if answer and answer != default else default
        except ConfigError as error:
            print(error)


def _one_of(text: str, choices: tuple[str, ...]) -> str:
    if text not in choices:
        raise ConfigError(f"{text!r} is not one of {', '.join(choices)}")
    return text


def _checked(name: str, text: str) -> str:
    SlideConfig.of({name: text})
    return text


if __name__ == "__main__":
    sys.exit(main())
