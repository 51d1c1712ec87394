"""What `import torch` calls last (entry point group `torch.backends`): nothing, except in Accelerate's command.

Invariant: never raises, imports no more than the standard library, and leaves no trace in a process that is not
`accelerate`. `TORCH_DEVICE_BACKEND_AUTOLOAD=0` turns it off. docs/decisions/0014.
"""

import os
import sys

_COMMANDS = ("accelerate", "accelerate-launch")


def autoload() -> None:
    """Let Accelerate's command take configurations with a `slideformer_config` section."""
    try:
        if _is_accelerate():
            from .launch import accept_section, after_import

            after_import("accelerate.commands.config", accept_section)
    except Exception:  # torch must import whatever happens; Accelerate then refuses the section itself
        pass


def _is_accelerate() -> bool:
    program = sys.argv[0]
    if program == "-m":  # the module is still being looked for, and its package imports torch
        program = sys.orig_argv[sys.orig_argv.index("-m") + 1]
        return program in ("accelerate.commands.accelerate_cli", "accelerate.commands.launch")
    return os.path.basename(program) in _COMMANDS
