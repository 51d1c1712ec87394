"""What importing the package costs, and that it does not get in the way of other packages' imports."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Packages that are extras, or that are slow to import and that a run may never need.
HEAVY = {"datasets", "evaluate", "liger_kernel", "trl", "peft", "matplotlib"}


def top_level_modules_after(statement: str) -> set[str]:
    """Return the top-level names in sys.modules of a fresh interpreter, at the repository root, after it."""
    return top_level_modules_after_each(statement)[0]


def top_level_modules_after_each(*statements: str) -> list[set[str]]:
    """Return the same after each of several statements in one interpreter."""
    program = "import json, sys\n" + "".join(
        f"{statement}\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))\n"
        for statement in statements
    )
    # Without torch's hooks: ours is a module of the package, which `import torch` would import (tests/launch).
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return [set(json.loads(line)) for line in result.stdout.splitlines()[-len(statements) :]]


def test_importing_the_package_imports_nothing_heavy():
    assert top_level_modules_after("import hf_slideformer") & HEAVY == set()


def test_importing_the_kernels_imports_neither_the_package_nor_anything_heavy():
    loaded = top_level_modules_after("import slideformer_kernels")
    assert loaded & (HEAVY | {"hf_slideformer", "transformers", "accelerate"}) == set()


def test_slide_trainer_imports_nothing_heavy_that_trainer_does_not():
    trainer, slide_trainer = top_level_modules_after_each(
        "from transformers import Trainer", "from hf_slideformer import SlideTrainer"
    )
    assert "transformers" in trainer and "hf_slideformer" in slide_trainer - trainer
    assert (slide_trainer - trainer) & HEAVY == set()


def test_trls_trainers_say_what_is_missing():
    program = (
        "import sys; sys.modules['trl'] = None\n"
        "import hf_slideformer\n"
        "assert 'SlideSFTTrainer' not in hf_slideformer.__all__\n"
        "try: hf_slideformer.SlideSFTTrainer\n"
        "except ImportError as error: assert 'hf-slideformer[trl]' in str(error), error\n"
        "else: raise AssertionError('imported')"
    )
    assert "hf_slideformer" in top_level_modules_after(program)


def test_transformers_imports_from_the_repository_root():
    """The folder `kernels/` must not pass for Hugging Face's package of that name, which transformers probes."""
    assert "transformers" in top_level_modules_after("import transformers; transformers.AutoModelForCausalLM")
    assert not (ROOT / "kernels" / "__init__.py").exists()
