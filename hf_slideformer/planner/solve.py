"""The choice: which decisions give the shortest step within the budgets, and what to change where none fit.

The first units of forward become residents and the last ones keep their activations (`Decisions.of` says why), so a
plan is a handful of numbers: how many residents, how many kept, whether the other inputs go to RAM, how many slots,
where the optimizer state outside of units lives. All numbers of residents are tried; for each the most units are kept
that fit, since keeping only ever shortens a step. What remains is simulated in the order of a lower bound on its time,
until that bound exceeds the best time found.

Where RAM is too small for all of that, optimizer state goes to disk, of as few units as are needed; where that of all
is not enough, weights, gradients and inputs follow.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..errors import PlanError
from ..machine.hardware import Hardware
from ..machine.presets import disk_rates
from ..memory.layout import EIGHT_BIT_MOMENTS, FP32_MOMENTS
from .memory import MemoryModel, missing_bytes
from .plan import (
    Plan,
    check_budgets,
    describe,
    format_bytes,
)
from .profile import ModelProfile
from .timeline import (
    Durations,
    predict,
    shortest_step_s,
    step_seconds,
)
from .workload import (
    DEFAULT_SLOTS,
    MIN_SLOTS,
    Budgets,
    Decisions,
    Workload,
)

# Predicted times that differ by less are alike.
TIE = 0.002

# Slots to choose from. The fewest, which leave no room for copies that come in bursts, serve where nothing else fits.
_SLOTS = (DEFAULT_SLOTS, DEFAULT_SLOTS + 1)
_FEWEST_SLOTS = (MIN_SLOTS,)

# Buffers for state on disk: one arrives, one is in use, one leaves; two where RAM is too small for three.
DISK_BUFFERS = 3
FEWEST_DISK_BUFFERS = 2
# What is tried in turn: the number of those buffers (0 is no disk), and whether weights may be on disk.
_DISK_MEASURES = (
    (0, False),
    (DISK_BUFFERS, False),
    (FEWEST_DISK_BUFFERS, False),
    (DISK_BUFFERS, True),
    (FEWEST_DISK_BUFFERS, True),
)

# Advice that changes less than this part of the speed is not worth a line.
_WORTH_SAYING = 1.1
_LARGEST_BATCH_FACTOR = 64


def solve(
    workload: Workload,
    hardware: Hardware,
    budgets: Budgets,
    *,
    placement: str = "auto",
    activations: str = "auto",
    profile_for: Callable[[int], ModelProfile] | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """The plan with the shortest predicted step that fits.

    Args:
        workload: what is planned for. Without a profile every unit streams, nothing is said of time, and the plan
            has no activations in it.
        hardware: the machine.
        budgets: bytes that may be used.
        placement: "auto", or "stream": every unit streams.
        activations: "auto", or one of "keep", "recompute" and "offload" for all units.
        profile_for: the profile of a micro-batch of another number of sequences, so that other batch sizes can be
            tried as remedies; None if there is no way to know.
        notes: sentences to show with the plan.

    Returns:
        The plan, with decisions for the engine.

    Raises:
        PlanError: nothing fits; with the least that is needed, and what would fit, each remedy tried.
    """
    question = _Question(workload, hardware, budgets, placement, activations, profile_for)
    found = list(_Search(question).fitting())
    if not found:
        raise _refusal(question)
    best = _fastest(question, found)
    prediction = None
    if workload.profile is not None and workload.training:
        prediction = predict(workload, hardware, best.decisions, best.pageable)
        if best.decisions.on_disk and (hardware.disk_read is None or hardware.disk_write is None):
            read, write = disk_rates(hardware)
            notes = [
                *notes,
                f"nobody measured the disk: {read / 1e9:.2f} GB/s reading and {write / 1e9:.2f} GB/s writing are "
                "estimates; `slideformer probe --dir DIR` measures them",
            ]
    return describe(workload, best.decisions, budgets=budgets, prediction=prediction, notes=notes)


@dataclass(frozen=True, slots=True)
class _Question:
    """What is asked of the planner; see `solve`."""

    workload: Workload
    hardware: Hardware
    budgets: Budgets
    placement: str
    activations: str
    profile_for: Callable[[int], ModelProfile] | None

    def with_workload(self, **changes) -> _Question:
        """The same question with other training settings."""
        return replace(self, workload=replace(self.workload, **changes))

    def with_batch_size(self, batch_size: int, **changes) -> _Question:
        """The same question with another number of sequences in a micro-batch."""
        assert self.profile_for is not None
        return self.with_workload(profile=self.profile_for(batch_size), **changes)


@dataclass(slots=True)
class _Candidate:
    decisions: Decisions
    nbytes: int
    pageable: float


class _Search:
    """Decisions for one question."""

    def __init__(self, question: _Question) -> None:
        self.question = question
        self.memory = MemoryModel(question.workload)
        self.units = len(question.workload.layouts)
        auto, keep = question.activations == "auto", question.activations == "keep"
        self.stream = _streams_all(question.workload, question.placement)
        self.most_resident = 0 if self.stream else self.units
        self.most_kept = self.units if keep or (auto and not self.stream) else 0
        self.least_kept = self.units if keep else 0
        self.rests = _rests(question.workload, question.activations)
        self._placed: dict[tuple[str, int, str], list[Decisions]] = {}

    def fitting(self) -> Iterator[_Candidate]:
        """Candidates that fit. Measures that cost time without a gain elsewhere are taken only where needed: optimizer
        state of units on disk, with the fewest buffers; state outside of units in RAM; the fewest slots; and with
        `placement="stream"` offloading.
        """
        steps = [(rest,) for rest in self.rests] if self.stream else [self.rests]
        for disk_buffers, weights in _DISK_MEASURES if _may_use_disk(self.question) else _DISK_MEASURES[:1]:
            for outside_state in ("GPU", "RAM"):
                for rests in steps:
                    for slots in (_SLOTS[:1] if self.stream else _SLOTS, _FEWEST_SLOTS):
                        found = [
                            candidate
                            for rest in rests
                            for count in slots
                            for decisions in self._of_each_resident(rest, count, outside_state)
                            if (candidate := self._candidate(decisions, disk_buffers, weights)) is not None
                        ]
                        if found:
                            yield from found
                            return

    def _of_each_resident(self, rest: str, slots: int, outside_state: str) -> list[Decisions]:
        """For each number of residents the decisions that keep most, if any fit the GPU; RAM is not looked at."""
        known = self._placed.get((rest, slots, outside_state))
        if known is not None:
            return known
        workload, kept = self.question.workload, self.most_kept
        placed = self._placed[rest, slots, outside_state] = list[Decisions]()
        for resident in range(self.most_resident + 1):
            streamed = self.units - resident
            if slots > max(DEFAULT_SLOTS, streamed):
                continue  # the same as with fewer

            def decide(kept: int, resident: int = resident) -> Decisions:
                return Decisions.of(
                    workload,
                    resident=resident,
                    kept=kept,
                    rest=rest,
                    slots=slots,
                    outside_state=outside_state,
                )

            most = self._most_kept(decide, kept)
            if most is None:
                continue
            kept = most
            if rest == "offload" and kept == self.units:
                continue  # nothing is left to offload
            placed.append(decide(kept))
        return placed

    def _candidate(self, decisions: Decisions, disk_buffers: int, weights: bool) -> _Candidate | None:
        """The decisions, with state on disk if there may be buffers for it and then also weights if they may be there,
        or None if they do not fit.
        """
        needs = self.needs(decisions)
        if disk_buffers:
            decisions = self.with_disk(decisions, disk_buffers, weights=weights)
            needs = needs[0], self.memory.ram_train(decisions), self.memory.disk_bytes(decisions)
        if any(self.missing(decisions, needs).values()):
            return None
        return _Candidate(decisions, sum(needs), self._pageable(decisions))

    def with_disk(self, decisions: Decisions, buffers: int, *, weights: bool) -> Decisions:
        """The same decisions with the optimizer state of the fewest units on disk with which RAM suffices.

        Where that of all units is not enough, it is all there, and with `weights` so are weights, gradients and inputs
        of the fewest units. State goes first: for each byte that leaves RAM it moves two in a step, weights three.

        They are spread evenly over forward, so that the disk works while other units are updated and computed.
        """
        in_ram = [unit.ram_state for unit in self.memory.units]
        on_disk = [unit.disk_state for unit in self.memory.units]
        resident = set(decisions.resident)
        # A frozen unit may have no such state, nor one that is trained in fp32 without moments.
        units = [unit for unit, nbytes in enumerate(on_disk) if nbytes and unit not in resident]
        if not units:
            return self._with_nothing_but_weights_on_disk(decisions, buffers) if weights else decisions
        gpu, ram, _ = self.needs(decisions)
        short = missing_bytes(self.question.workload, self.question.budgets, gpu, ram)["RAM"]
        fewest = max(1, min(len(units), -(-short // max(in_ram[unit] for unit in units))))

        def moved(count: int) -> Decisions:
            return replace(decisions, on_disk=_evenly(units, count), disk_buffers=min(buffers, count))

        everything = moved(len(units))
        if not self._fits_ram(everything):
            return self._with_weights_on_disk(everything, units) if weights else everything
        for count in range(fewest, len(units)):
            chosen, held = _evenly(units, count), min(buffers, count)
            relief = sum(in_ram[unit] for unit in chosen) - held * max(on_disk[unit] for unit in chosen)
            if relief >= short and self._fits_ram(moved(count)):
                return moved(count)
        return everything

    def _with_nothing_but_weights_on_disk(self, decisions: Decisions, buffers: int) -> Decisions:
        """The same for units that are trained and have no other state."""
        layouts, resident = self.question.workload.layouts, set(decisions.resident)
        units = [unit for unit, one in enumerate(layouts) if one.trainable_numel and unit not in resident]
        if not units:
            return decisions
        found = self._with_weights_on_disk(
            replace(decisions, on_disk=tuple(units), disk_buffers=buffers), units
        )
        whole = found.weights_on_disk
        return replace(found, on_disk=whole, disk_buffers=min(buffers, len(whole)))

    def _with_weights_on_disk(self, decisions: Decisions, units: Sequence[int]) -> Decisions:
        """The same decisions with weights and gradients of the fewest units on disk with which RAM suffices; of all
        units if it never does.
        """

        def moved(count: int) -> Decisions:
            return decisions.with_weights_on_disk(self.question.workload, _evenly(units, count))

        low, high = 1, len(units)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._fits_ram(moved(middle)) else (middle + 1, high)
        return moved(low)

    def _most_kept(self, decide: Callable[[int], Decisions], guess: int) -> int | None:
        """The most units whose activations can be kept on the GPU, looked for around `guess`.

        None if no plan fits. What fits with some units fits with fewer.
        """
        fits = self._fits_gpu
        low, high = self.least_kept, self.most_kept
        if not fits(decide(low)):
            return None
        stride = 1
        guess = max(low, min(high, guess))
        if fits(decide(guess)):
            low = guess
            while low < high and fits(decide(min(high, low + stride))):
                low, stride = min(high, low + stride), 2 * stride
            high = min(high, low + stride - 1)
        else:
            high = guess - 1
            while low < high and not fits(decide(max(low, high - stride + 1))):
                high, stride = max(low, high - stride), 2 * stride
        while low < high:
            middle = (low + high + 1) // 2
            if fits(decide(middle)):
                low = middle
            else:
                high = middle - 1
        return low

    def _fits_gpu(self, decisions: Decisions) -> bool:
        workload, budgets = self.question.workload, self.question.budgets
        return not missing_bytes(workload, budgets, self.memory.gpu_peak(decisions), 0)["GPU"]

    def _fits_ram(self, decisions: Decisions) -> bool:
        # Where RAM stands in for the GPU, state on disk changes nothing of that.
        gpu = 0 if self.question.workload.on_gpu else self.memory.gpu_peak(decisions)
        return not self.missing(decisions, (gpu, self.memory.ram_train(decisions), 0))["RAM"]

    def needs(self, decisions: Decisions) -> tuple[int, int, int]:
        """Bytes of GPU, RAM and disk in training."""
        memory = self.memory
        return memory.gpu_peak(decisions), memory.ram_train(decisions), memory.disk_bytes(decisions)

    def missing(self, decisions: Decisions, needs: tuple[int, int, int] | None = None) -> dict[str, int]:
        """Bytes by which loading or training exceeds the budgets, by tier; `needs` are those of training."""
        workload, budgets, memory = self.question.workload, self.question.budgets, self.memory
        short = [
            missing_bytes(workload, budgets, *peaks)
            for peaks in (
                (memory.gpu_load(decisions), memory.ram_load(decisions)),
                needs or self.needs(decisions),
            )
        ]
        return {tier: max(one[tier] for one in short) for tier in ("GPU", "RAM", "disk")}

    def _pageable(self, decisions: Decisions) -> float:
        """Share of what ought to be pinned that exceeds the budget for it."""
        budget = self.question.budgets.pinned
        wanted = sum(item.nbytes for item in self.memory.ram_items(decisions) if item.pinned)
        return max(0.0, 1 - budget / wanted) if budget is not None and wanted else 0.0

    def least(self) -> Decisions:
        """The decisions that come nearest to the budgets: first the GPU's, then that of RAM, then that of the disk."""
        frugal = frugal_decisions(
            self.question.workload,
            placement=self.question.placement,
            activations=self.question.activations,
        )
        uses_disk = _may_use_disk(self.question)

        def tried() -> Iterator[Decisions]:
            for decisions in frugal:
                yield decisions
                if uses_disk and self._fits_gpu(decisions) and not self._fits_ram(decisions):
                    yield self.with_disk(decisions, FEWEST_DISK_BUFFERS, weights=True)

        def shortfall(decisions: Decisions) -> tuple[int, int, int, int]:
            needs = self.needs(decisions)
            missing = self.missing(decisions, needs)
            return missing["GPU"], missing["RAM"], missing["disk"], sum(needs)

        return min(tried(), key=shortfall)


def _is_known(workload: Workload) -> bool:
    return workload.profile is not None and workload.training


def _may_use_disk(question: _Question) -> bool:
    return question.budgets.disk is not None and question.workload.training


def _evenly(units: Sequence[int], count: int) -> tuple[int, ...]:
    """So many of the units, at equal distances, the last one among them."""
    return tuple(units[(index + 1) * len(units) // count - 1] for index in range(count))


def _streams_all(workload: Workload, placement: str) -> bool:
    """Whether no unit may stay; where nothing is known of activations, room for them cannot be given away."""
    return placement == "stream" or not _is_known(workload)


def _rests(workload: Workload, activations: str) -> tuple[str, ...]:
    """What may happen to the activations of units that do not keep them."""
    if activations == "auto":
        return ("recompute", "offload") if _is_known(workload) else ("recompute",)
    return ("recompute",) if activations == "keep" else (activations,)


def frugal_decisions(workload: Workload, *, placement: str, activations: str) -> Iterator[Decisions]:
    """Decisions that keep no more activations than they must, for every number of residents.

    Args:
        workload: what is planned for.
        placement: as for `solve`.
        activations: as for `solve`.
    """
    units = len(workload.layouts)
    for outside_state in ("GPU", "RAM"):
        for rest in _rests(workload, activations):
            for resident in range(1 if _streams_all(workload, placement) else units + 1):
                yield Decisions.of(
                    workload,
                    resident=resident,
                    kept=units if activations == "keep" else 0,
                    rest=rest,
                    slots=MIN_SLOTS,
                    outside_state=outside_state,
                )


def _fastest(question: _Question, found: Sequence[_Candidate]) -> _Candidate:
    """The candidate with the shortest step; of those that are alike the one with most units on the GPU.

    What stays there depends least on how right the rates of link and update are. After that fewer bytes count.
    """
    if len(found) == 1:
        return found[0]

    def rank(one: _Candidate) -> tuple[int, int]:
        return -len(one.decisions.resident), one.nbytes

    times = Durations.of(question.workload, question.hardware)
    bounds = [(shortest_step_s(times, one.decisions, one.pageable), rank(one), one) for one in found]
    bounds.sort(key=lambda entry: entry[:2])
    simulated: list[tuple[float, _Candidate]] = []
    best_s, best_rank = float("inf"), (0, 0)
    for bound, ranked, candidate in bounds:
        if bound > best_s * (1 + TIE):
            break
        if bound >= best_s * (1 - TIE) and simulated and ranked >= best_rank:
            continue  # neither faster nor to be preferred
        simulated.append((step_seconds(times, candidate.decisions, candidate.pageable), candidate))
        best_s = min(seconds for seconds, _ in simulated)
        best_rank = min(rank(one) for seconds, one in simulated if seconds <= best_s * (1 + TIE))
    alike = [one for seconds, one in simulated if seconds <= best_s * (1 + TIE)]
    return min(alike, key=rank)


# -- what to change ----------------------------------------------------------------------------------------------


def _refusal(question: _Question) -> PlanError:
    """The error for a question that nothing answers: what is missing at least, and what would fit.

    Every remedy that is named was tried.
    """
    plan, _ = _least(question)
    budgets = question.budgets
    short = missing_bytes(
        question.workload, budgets, *(plan.tier_bytes(tier) for tier in ("GPU", "RAM", "disk"))
    )
    tier = next((tier for tier, nbytes in short.items() if nbytes), "RAM")
    hints = _remedies(question, plan, tier)
    try:
        check_budgets(plan, question.budgets, hints)
    except PlanError as error:
        return error
    # Training fits, loading does not.
    peak = plan.peaks["load"]
    needed = peak["RAM"] + (peak["GPU"] if plan.device == "CPU" else 0)
    budget = question.budgets.ram
    return PlanError(
        f"Loading the model needs {format_bytes(needed)} of RAM; {format_bytes(budget)} may be used. "
        "Raise cpu_memory or free some, load safetensors in the dtype that they are saved in (they are mapped, and "
        "take no RAM), or use a smaller model."
    )


def _least(question: _Question) -> tuple[Plan, bool]:
    """The plan that comes nearest to the budgets, and whether it keeps to them."""
    search = _Search(question)
    decisions = search.least()
    enough = not any(search.missing(decisions).values())
    return describe(question.workload, decisions, budgets=question.budgets), enough


def _remedies(question: _Question, plan: Plan, tier: str) -> list[str]:
    """Sentences on single changes, cheapest first; on changes together if no single one is enough."""
    hints, solved = [], False
    for label, variant in _variants(question):
        other, enough = _least(variant)
        needs = _needed(other, tier)
        solved = solved or enough
        if enough:
            hints.append(f"With {label} {_what_fits(other, tier)}.")
        elif needs < _needed(plan, tier):
            hints.append(f"With {label} it needs {format_bytes(needs)} of {tier}.")
    together, labels = question, list[str]()
    for label, change in _changes(question):
        if solved:
            break
        together, labels = change(together), [*labels, label]
        other, enough = _least(together)
        if enough and len(labels) > 1:
            hints.append(f"With {' and '.join(labels)} {_what_fits(other, tier)}.")
            solved = True
    if not solved and tier != "disk":
        hints.append("No setting makes it fit.")
    return hints


def _what_fits(plan: Plan, tier: str) -> str:
    """What a plan needs that fits; how much there will be of a disk that is yet to be named is not known."""
    if tier == "disk" and not plan.decisions.on_disk:
        return "it fits without a disk"
    needs = f"it needs {format_bytes(_needed(plan, tier))} of {tier}, which fits"
    if plan.decisions.on_disk and tier != "disk":
        needs += f", and {format_bytes(plan.tier_bytes('disk'))} of disk"
    return needs


def _needed(plan: Plan, tier: str) -> int:
    """Bytes of a tier; where RAM stands in for the GPU, of both in RAM."""
    stand_in = plan.tier_bytes("GPU") if tier == "RAM" and plan.device == "CPU" else 0
    return plan.tier_bytes(tier) + stand_in


def _changes(question: _Question) -> Iterator[tuple[str, Callable[[_Question], _Question]]]:
    """Settings that need less memory, each as a change to a question, cheapest first."""
    workload = question.workload
    if question.placement != "auto":
        yield "placement='auto'", lambda asked: replace(asked, placement="auto")
    if question.activations != "auto":
        yield "activations='auto'", lambda asked: replace(asked, activations="auto")
    if workload.training and not workload.overlapped:
        more = workload.fp32_sums
        yield (
            "max_grad_norm=0" + (" and gradient_accumulation_steps=1" if more else ""),
            lambda asked: asked.with_workload(overlapped=True, micro_batches=1),
        )
    if workload.training and workload.moments is FP32_MOMENTS:
        yield "optimizer_states='8bit'", lambda asked: asked.with_workload(moments=EIGHT_BIT_MOMENTS)
    profile = workload.profile
    if question.profile_for is not None and profile is not None and profile.batch_size > 1:
        yield "batch_size=1", lambda asked: asked.with_batch_size(1)
    if workload.training and question.budgets.disk is None:
        yield "nvme_dir", lambda asked: replace(asked, budgets=replace(asked.budgets, disk=sys.maxsize))


def _variants(question: _Question) -> Iterator[tuple[str, _Question]]:
    """The question with one setting changed; of batch sizes the largest that fits, halving."""
    for label, change in _changes(question):
        if label != "batch_size=1":
            yield label, change(question)
            continue
        assert question.workload.profile is not None
        size = question.workload.profile.batch_size // 2
        while size > 1 and not _least(question.with_batch_size(size))[1]:
            size //= 2
        yield f"batch_size={size}", question.with_batch_size(size)


def advise(
    workload: Workload,
    hardware: Hardware,
    budgets: Budgets,
    *,
    placement: str = "auto",
    activations: str = "auto",
    profile_for: Callable[[int], ModelProfile] | None = None,
) -> tuple[str, ...]:
    """What would make training faster, each tried: sentences, the largest gain first.

    Args:
        workload: as for `solve`, with a profile.
        hardware: as for `solve`.
        budgets: as for `solve`.
        placement: as for `solve`.
        activations: as for `solve`.
        profile_for: as for `solve`.

    Raises:
        PlanError: the workload does not fit as it is.
    """
    question = _Question(workload, hardware, budgets, placement, activations, profile_for)
    now = _speed(question)
    gains: list[tuple[float, str]] = []

    def consider(label: str, variant: _Question) -> float:
        try:
            speed = _speed(variant)
        except PlanError:
            return 0.0
        if speed >= _WORTH_SAYING * now:
            gains.append((speed / now, label))
        return speed

    _consider_batches(question, now, gains)
    if placement != "auto" or activations != "auto":
        auto = replace(question, placement="auto", activations="auto")
        consider("placement='auto' and activations='auto'", auto)
    if workload.moments is FP32_MOMENTS:
        consider(
            "optimizer_states='8bit' (other results than with fp32 moments)",
            question.with_workload(moments=EIGHT_BIT_MOMENTS),
        )
    if not workload.overlapped and not workload.fp32_sums:
        consider("max_grad_norm=0 (no clipping)", question.with_workload(overlapped=True))
    if workload.fp32_sums and profile_for is not None and workload.profile is not None:
        size = workload.profile.batch_size * workload.micro_batches
        consider(
            f"batch size {size} and no accumulation, which is the same step",
            question.with_batch_size(size, micro_batches=1),
        )
    return tuple(
        f"with {label}: {gain:.1f}x the tokens/s"
        for gain, label in sorted(gains, key=lambda entry: -entry[0])
    )


def _consider_batches(question: _Question, now: float, gains: list[tuple[float, str]]) -> None:
    """Double the batch as long as it fits and helps; keep the smallest that is nearly as fast as the best."""
    profile = question.workload.profile
    if question.profile_for is None or profile is None:
        return
    speeds: list[tuple[int, float]] = []
    factor = 2
    while factor <= _LARGEST_BATCH_FACTOR:
        size = profile.batch_size * factor
        try:
            speeds.append((size, _speed(question.with_batch_size(size))))
        except PlanError:
            break
        before = speeds[-2][1] if len(speeds) > 1 else now
        if speeds[-1][1] < before * 1.02:
            break
        factor *= 2
    if not speeds:
        return
    best = max(speed for _, speed in speeds)
    size, speed = next(entry for entry in speeds if entry[1] >= best / 1.05)
    if speed >= _WORTH_SAYING * now:
        gains.append((speed / now, f"batch size {size}"))


def _speed(question: _Question) -> float:
    """Tokens a second of the fastest plan."""
    found = list(_Search(question).fitting())
    if not found:
        raise PlanError("it does not fit")
    best, workload = _fastest(question, found), question.workload
    assert workload.profile is not None, "times need a profile"
    times = Durations.of(workload, question.hardware)
    tokens = workload.profile.tokens * workload.micro_batches
    return tokens / step_seconds(times, best.decisions, best.pageable)
