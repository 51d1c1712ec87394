"""What the documentation tells people to write can be used, and the files that it names are there."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from hf_slideformer import SlideConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "README.md"]
FOLDERS = ("hf_slideformer", "kernels", "tests", "examples", "docs")
# Files that pages name and that are not ours.
OTHERS = {"integrations/deepspeed.py", "offload_config.py", "zero_to_fp32.py"}


@pytest.mark.parametrize("page", ["using-accelerate.md", "from-deepspeed.md"])
def test_configurations_in_the_documentation_can_be_used(page):
    blocks = re.findall(
        r"^```yaml\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    sections = [yaml.safe_load(block)["slideformer_config"] for block in blocks]
    assert sections
    assert all(SlideConfig.of(section) != SlideConfig() for section in sections)


def test_settings_that_deepspeeds_keys_are_mapped_to():
    rows = re.findall(r"^\| .*\|$", (DOCS / "from-deepspeed.md").read_text(encoding="utf-8"), re.MULTILINE)
    assigned = {
        name for code in re.findall(r"`([^`]+)`", "\n".join(rows)) for name in re.findall(r"\b(\w+)=", code)
    }
    ours = {field.name for field in dataclasses.fields(SlideConfig)}
    trainers = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert {"optimizer_states", "activations", "placement", "optim", "bf16"} <= assigned
    assert assigned <= ours | trainers


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page):
    code = re.findall(r"`([^`\s]+)`", page.read_text(encoding="utf-8"))
    packages = [path.name for path in (ROOT / "hf_slideformer").iterdir() if path.is_dir()]
    folders = "|".join([*FOLDERS, *packages])
    paths = {name for name in code if re.search(rf"\.(py|c|h)$|^({folders})/[\w./-]*$", name)} - OTHERS
    assert [path for path in sorted(paths) if not _exists(path, page)] == []


def _exists(path: str, page: Path) -> bool:
    if "/" not in path:  # a file that was named in full before, or that a table of files is about
        places = (ROOT / name for name in FOLDERS)
        return any(next(place.rglob(path), None) for place in places)
    return any(
        (place / path).exists() for place in (ROOT, ROOT / "hf_slideformer", ROOT / "kernels", page.parent)
    )


def test_the_picture_of_the_rooms_is_what_its_script_draws():
    drawn = subprocess.run(
        [sys.executable, DOCS / "draw_rooms.py"], capture_output=True, text=True, check=True
    )
    picture = (DOCS / "assets" / "rooms.svg").read_text(encoding="utf-8")
    assert picture == drawn.stdout, "run: python docs/draw_rooms.py > docs/assets/rooms.svg"


def test_files_in_the_picture_of_the_rooms_exist():
    picture = (DOCS / "assets" / "rooms.svg").read_text(encoding="utf-8")
    named = re.findall(r'data-path="([^"]+)">([^<]+)</text>', picture)
    shown = re.findall(r">([\w/]+(?:\.py|/))<", picture)
    assert len(named) == len(shown) > 20, "a name without its path"
    assert [path for path, _ in named if not (ROOT / path).exists()] == []
    assert all(path.endswith(name) for path, name in named)


def test_no_more_lines_name_a_tier_than_contributing_says():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^  (grep .*)$", text, re.MULTILINE)
    (figure,) = re.findall(r"^  There are at most (\d+)\.", text, re.MULTILINE)
    found = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 0 < len(found.splitlines()) <= int(figure), found
