"""The update worker's thread ends if an event cannot be queried, and whoever waits for its jobs waits for ever.

UpdateWorker._take asks handle.is_complete (event.query()) outside of any try. After a device-side assertion every
CUDA call raises; engine.reset() then hangs in settle(unit.pending_update) instead of handing on the error.
Here an event whose query raises stands in for CUDA's.
"""

import os
import sys
import threading
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.simplefilter("ignore")
threading.excepthook = lambda args: print("thread", args.thread.name, "ended by", repr(args.exc_value))
from hf_slideformer.memory.transfer import Handle
from hf_slideformer.memory.worker import UpdateWorker
from hf_slideformer.metrics import Metrics


class BrokenEvent:
    def query(self):
        raise RuntimeError("CUDA error: device-side assert triggered")

    def synchronize(self):
        raise RuntimeError("CUDA error: device-side assert triggered")


worker = UpdateWorker(Metrics())
landed = Handle("gradients of layer 3")
landed.complete(BrokenEvent())
job = worker.submit("update of layer 3", lambda: None, priority=0, after=(landed,))
later = worker.submit("update of layer 2", lambda: None, priority=0)
ended = job._issued.wait(10) and later._issued.wait(10)
print("jobs ended within 10 s:", ended, "; worker alive:", worker._thread.is_alive())
print("PASS" if ended else "FAIL")
sys.stdout.flush()
os._exit(0 if ended else 1)
