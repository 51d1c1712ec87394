"""What the documentation tells people to write can be used."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from hf_slideformer import SlideConfig

DOCS = Path(__file__).parents[1] / "docs"


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
