"""The updates that the tests go through: each rule, with each format of its moments, on both kinds of master."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from slideformer_kernels import MOMENT_BLOCK_NUMEL, adamw_scalars, lion_scalars, reference, sgd_scalars
from slideformer_kernels.rules import ADAMW, LION, SGD, Rule

State = dict[str, torch.Tensor]

STEPS = ((1, 1.0, 0.0), (2, 0.3712345, 0.1), (1000, 1.0, 0.01))
"""Step number, grad_scale, weight_decay."""

MOMENTS = tuple(ADAMW.formats["adamw"])
CODES = tuple(ADAMW.formats["adamw_8bit"])

# What no state has by its name is made like another moment.
LIKE = {"momentum_buffer": "exp_avg"}

SIZES = [0, 1, 31, 1023, 1024, 1025, 100003]
SIZES_8BIT = [0, 1, 127, 128, 129, 1025, 100003]


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One kind of update.

    Attributes:
        name: what it is called in tests' names and messages.
        rule: what is applied.
        kernel: which of the rule's formats the moments have.
        is_split: whether the master is (hi, lo).
        scalars: returns those of (step number, weight decay).
    """

    name: str
    rule: Rule
    kernel: str
    is_split: bool
    scalars: Callable[[int, float], object]

    def __str__(self) -> str:
        return f"{self.name}-{'split' if self.is_split else 'fp32'}"

    @property
    def is_8bit(self) -> bool:
        return self.kernel.endswith("_8bit")

    @property
    def sizes(self) -> list[int]:
        """Numbers of elements around those where a kernel changes its ways."""
        return SIZES_8BIT if self.is_8bit else SIZES

    def select(self, state: State) -> State:
        """Take what this kind of update works on from a state that ``make_state`` made for its format."""
        hi, lo = reference.split_master(state["weight"])
        masters = {"hi": hi, "lo": lo} if self.is_split else {"weight": state["weight"]}
        return {
            **masters,
            "grad": state["grad"],
            **{name: state[LIKE.get(name, name)] for name in self._moments},
        }

    def apply(
        self,
        module: ModuleType,
        state: State,
        scalars: object,
        grad_scale: float | torch.Tensor = 1.0,
        **options: object,
    ) -> None:
        """Update ``state`` by the implementation in ``module``."""
        masters = [state[name] for name in (("hi", "lo") if self.is_split else ("weight",))]
        moments = {name: state[name] for name in self._moments}
        update = getattr(module, self.rule.name)
        update(masters, state["grad"], moments, scalars, grad_scale, **options)

    @property
    def _moments(self) -> list[str]:
        return list(self.rule.formats[self.kernel])


def adamw_of(step: int, weight_decay: float) -> object:
    return adamw_scalars(lr=3e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=weight_decay, step=step)


def lion_of(step: int, weight_decay: float) -> object:
    return lion_scalars(lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=weight_decay, step=step)


def sgd_of(
    momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False
) -> Callable[[int, float], object]:
    options = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
    return lambda step, weight_decay: sgd_scalars(lr=1e-2, weight_decay=weight_decay, step=step, **options)


CASES = [
    Case(name, rule, kernel, is_split, scalars)
    for name, rule, kernel, scalars in (
        ("adamw", ADAMW, "adamw", adamw_of),
        ("adamw_8bit", ADAMW, "adamw_8bit", adamw_of),
        ("lion", LION, "lion", lion_of),
        ("sgd", SGD, "sgd", sgd_of()),
        ("sgd_momentum", SGD, "sgd_momentum", sgd_of(momentum=0.9, dampening=0.3)),
        ("sgd_nesterov", SGD, "sgd_momentum", sgd_of(momentum=0.9, nesterov=True)),
    )
    for is_split in (False, True)
]
BY_NAME = {str(case): case for case in CASES}
CASES_8BIT = [case for case in CASES if case.is_8bit]


def clone(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def moments_of(*values: int | torch.Tensor) -> State:
    """Name fp32 moments of AdamW; for a number of elements, those of a new parameter."""
    tensors = [torch.zeros(values[0]) for _ in MOMENTS] if len(values) == 1 else values
    return dict(zip(MOMENTS, tensors, strict=True))


def codes_of(numel: int) -> State:
    """Make 8-bit moments of a new parameter."""
    blocks = -(-numel // MOMENT_BLOCK_NUMEL)
    return {
        name: torch.zeros(blocks if name.endswith("_scale") else numel, dtype=dtype)
        for name, dtype in ADAMW.formats["adamw_8bit"].items()
    }
