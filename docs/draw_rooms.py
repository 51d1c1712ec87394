"""Draws the rooms and the two ways through them: python docs/draw_rooms.py > docs/assets/rooms.svg."""

from __future__ import annotations

from html import escape

PACKAGE = "hf_slideformer"
WIDTH, HEIGHT = 960, 1132

INK, QUIET = "#1c2430", "#475061"
CANVAS, ROOM, FILE = "#eceff3", "#f8f9fb", "#ffffff"
EDGE = "#a3acb9"
PARAMETER, GRADIENT = "#1f5fa8", "#b04a12"
SANS = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
MONO = "Menlo, Consolas, 'DejaVu Sans Mono', monospace"

LEGEND = {
    "The way of a parameter": (
        PARAMETER,
        (
            "home.source lends the weights, once their update is done",
            "link.fill reads the lease, on the lane to the device",
            "a slot of the pool is full",
            "leaves over the slot stand in for the layer's parameters",
            "released: an event, which the slot's next copy waits for",
            "an update writes the master, at home",
        ),
    ),
    "The way of a gradient": (
        GRADIENT,
        (
            "the layer's autograd.Function hands it to gradients.push",
            "home.land, where nothing waits yet",
            "link.collect copies it, on the lane from the device",
            "it is home: at once, or through staging (sums, disk, overlap)",
            "clipping reads the norms and keeps one coefficient",
            "updates: hyperparameters and coefficient of this step",
            "home.step, group by group in forward order",
            "the worker takes it, once gradient and state are there",
            "rule.apply, a run of neighbours at a time",
        ),
    ),
}


class Picture:
    """Collects the elements of one SVG."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._badges: list[str] = []

    def box(self, x: int, y: int, w: int, h: int, fill: str, *, dashed: bool = False) -> None:
        """A box with rounded corners."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="7" fill="{fill}" stroke="{EDGE}"{dash}/>'
        )

    def text(
        self, x: int, y: int, words: str, *, size: int = 13, color: str = QUIET, bold: bool = False
    ) -> None:
        """A line of words, from (x, y) on."""
        weight = ' font-weight="bold"' if bold else ""
        self._parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}"{weight}>{escape(words)}</text>'
        )

    def name(self, x: int, y: int, path: str, shown: str, *, size: int = 13) -> None:
        """The name of a file or folder of the package."""
        self._parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{INK}" font-weight="bold" font-family="{escape(MONO)}" '
            f'data-path="{PACKAGE}/{path}">{shown}</text>'
        )

    def room(self, x: int, y: int, w: int, h: int, path: str, *lines: str) -> None:
        """A folder."""
        self.box(x, y, w, h, ROOM)
        self.name(x + 12, y + 21, path, path, size=14)
        for number, line in enumerate(lines):
            self.text(x + 12, y + 41 + 17 * number, line)

    def file(self, x: int, y: int, w: int, h: int, path: str, *lines: str) -> None:
        """A file in its room."""
        self.box(x, y, w, h, FILE)
        self.name(x + 10, y + 19, path, path.rstrip("/").rpartition("/")[2] + "/" * path.endswith("/"))
        for number, line in enumerate(lines):
            self.text(x + 10, y + 37 + 16 * number, line)

    def arrow(self, color: str, number: int, *points: tuple[int, int], at: tuple[int, int]) -> None:
        """A line through `points` that ends in an arrow; its number stands at `at`."""
        path = " ".join(f"{x},{y}" for x, y in points)
        head = "parameter" if color == PARAMETER else "gradient"
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2.2" marker-end="url(#{head})"/>'
        )
        self.badge(color, number, *at)

    def badge(self, color: str, number: int, x: int, y: int) -> None:
        """A number of one of the ways."""
        self._badges.append(
            f'<circle cx="{x}" cy="{y}" r="10" fill="{color}"/><text x="{x}" y="{y + 4}" font-size="12" fill="#ffffff" '
            f'font-weight="bold" text-anchor="middle">{number}</text>'
        )

    def svg(self) -> str:
        """The whole picture."""
        heads = "".join(
            f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0,0 L10,5 L0,10 z" fill="{color}"/></marker>'
            for name, color in (("parameter", PARAMETER), ("gradient", GRADIENT))
        )
        return "\n".join(
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="{escape(SANS)}">',
                "<title>The rooms, and the ways of a parameter and of a gradient through them</title>",
                f"<defs>{heads}</defs>",
                f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="{CANVAS}"/>',
                *self._parts,
                *self._badges,
                "</svg>",
            )
        )


def draw() -> str:
    """The picture as SVG."""
    picture = Picture()
    _engine(picture)
    _below(picture)
    _ways(picture)
    _legend(picture)
    return picture.svg()


def _engine(p: Picture) -> None:
    p.box(14, 12, 932, 578, CANVAS, dashed=True)
    p.name(26, 33, "engine/", "engine/", size=14)
    p.file(
        28,
        44,
        288,
        74,
        "engine/engine.py",
        "makes the parts, and says what comes",
        "after what; the sink of the executor",
    )
    p.room(
        330,
        44,
        292,
        74,
        "engine/model/",
        "what a model consists of; moves nothing:",
        "Setup, units, head, blueprint",
    )
    p.room(
        636,
        44,
        296,
        74,
        "engine/profiling/",
        "what a model needs and computes,",
        "without running it; for the planner",
    )

    p.room(28, 132, 904, 102, "engine/run/")
    p.text(150, 153, "runs one unit; knows leases and a sink, no home")
    p.file(40, 164, 240, 60, "engine/run/executor.py", "forward: a layer over its leaves")
    p.file(296, 164, 260, 60, "engine/run/executor.py", "backward: an autograd.Function")
    p.file(572, 164, 160, 60, "engine/run/recompute.py", "no activations kept")
    p.file(748, 164, 172, 60, "engine/run/deferred_logits.py", "the loss, fused")

    p.room(130, 252, 802, 326, "engine/state/")
    p.text(410, 273, "where training state lives, and all that changes it")
    p.file(296, 284, 176, 60, "engine/state/gradients.py", "push; end of backward")
    p.file(520, 284, 176, 60, "engine/state/clipping.py", "clip_grad_norm_")
    p.file(744, 284, 176, 60, "engine/state/updates.py", "which group when")
    p.box(142, 384, 778, 182, ROOM)
    p.name(154, 406, "engine/state/home.py", "home.py")
    p.text(154, 423, "what can be asked of a home")
    p.box(154, 432, 426, 124, FILE)
    p.name(166, 452, "engine/state/streamed.py", "streamed.py")
    p.text(272, 452, "units that stream: land, step")
    p.file(166, 462, 190, 84, "engine/state/in_ram.py", "everything in buffers", "of the unit's own")
    p.file(
        368,
        462,
        200,
        84,
        "engine/state/on_disk.py",
        "a file; gradients may wait",
        "there too; buffers that all",
        "such units pass through",
    )
    p.file(
        592,
        462,
        158,
        84,
        "engine/state/beside_device.py",
        "weights on the GPU,",
        "masters in RAM:",
        "embedding and head",
    )
    p.file(
        762,
        462,
        146,
        84,
        "engine/state/on_device.py",
        "residents: a kernel",
        "updates them",
        "where they are",
    )


def _below(p: Picture) -> None:
    p.box(14, 608, 716, 202, ROOM)
    p.name(122, 629, "memory/", "memory/", size=14)
    p.text(276, 629, "moves and lends bytes")
    p.file(26, 644, 150, 92, "memory/pool.py", "slots on the device", "that units take", "turns in")
    p.file(26, 750, 150, 48, "memory/disk/", "files and their desks")
    p.file(206, 644, 150, 60, "memory/lease.py", "one way to lend")
    p.file(372, 644, 150, 60, "memory/staging.py", "for a short stay")
    p.file(206, 738, 340, 60, "memory/link.py", "fill a slot, collect gradients")
    p.file(574, 644, 144, 60, "memory/worker.py", "one CPU thread")
    p.file(574, 738, 144, 60, "memory/runtime.py", "lanes, link, worker")
    p.room(748, 608, 198, 202, "optim/")
    p.file(760, 644, 174, 76, "optim/rule.py", "one optimizer's update,", "for all others")
    p.file(760, 734, 174, 64, "optim/adamw.py")
    p.name(770, 771, "optim/lion.py", "lion.py")
    p.name(770, 789, "optim/sgd.py", "sgd.py")
    p.room(14, 824, 458, 56, "planner/", "what lives where, and how fast that is; pure")
    p.room(488, 824, 458, 56, "machine/", "what a machine has, and how fast it is")


def _ways(p: Picture) -> None:
    blue, red = PARAMETER, GRADIENT
    p.arrow(blue, 1, (260, 546), (260, 642), at=(260, 594))
    p.arrow(blue, 2, (260, 704), (260, 736), at=(280, 721))
    p.arrow(blue, 3, (206, 768), (191, 768), (191, 690), (178, 690), at=(191, 729))
    p.arrow(blue, 4, (60, 644), (60, 226), at=(60, 440))
    p.arrow(blue, 5, (102, 224), (102, 642), at=(102, 440))
    p.arrow(blue, 6, (676, 644), (676, 568), at=(676, 597))
    p.arrow(red, 1, (384, 224), (384, 282), at=(384, 245))
    p.arrow(red, 2, (384, 344), (384, 430), at=(384, 370))
    p.arrow(red, 3, (534, 556), (534, 736), at=(534, 597))
    p.arrow(red, 4, (446, 738), (446, 706), at=(466, 722))
    p.arrow(red, 4, (446, 644), (446, 558), at=(446, 597))
    p.arrow(red, 5, (472, 322), (518, 322), at=(494, 304))
    p.arrow(red, 6, (696, 322), (742, 322), at=(718, 304))
    p.arrow(red, 7, (832, 344), (832, 382), at=(850, 362))
    p.arrow(red, 8, (620, 566), (620, 642), at=(620, 597))
    p.arrow(red, 9, (718, 682), (758, 682), at=(738, 664))


def _legend(p: Picture) -> None:
    for column, (title, (color, steps)) in enumerate(LEGEND.items()):
        x = 26 + 462 * column
        p.text(x, 908, title, size=14, color=INK, bold=True)
        for number, words in enumerate(steps):
            y = 928 + 23 * number
            p.badge(color, number + 1, x + 9, y)
            p.text(x + 27, y + 4, words, color=INK)


if __name__ == "__main__":
    print(draw())
