"""The last fsync of a save fails (EIO on the run's directory): the error says that nothing is left, the checkpoint is there.

NewCheckpoint._commit renames, then syncs the parent; where that raises, abandon() cannot take the rename back, removes
what was replaced, and BackgroundSave.is_in_place stays False (so the best checkpoint is forgotten, nothing is rotated).
"""

import errno
import os
import sys
import tempfile
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.simplefilter("ignore")
from pathlib import Path

from hf_slideformer.checkpoint import BackgroundSave, CheckpointCalls, NewCheckpoint

out = Path(tempfile.mkdtemp())


class Failing(CheckpointCalls):
    def fsync(self, descriptor):
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")) == out and (out / "checkpoint-10").exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().fsync(descriptor)


checkpoint = NewCheckpoint(out / "checkpoint-10", Failing(), 1000)
(checkpoint.path / "config.json").write_text("{}")
save = BackgroundSave(checkpoint, lambda: None)
error = save.wait()
there = (out / "checkpoint-10").exists()
print("error:", str(error)[:150])
print("is_in_place:", save.is_in_place, "; checkpoint-10 exists:", there)
ok = save.is_in_place == there
print("PASS" if ok else "FAIL")
sys.exit(0 if ok else 1)
