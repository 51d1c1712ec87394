"""After a device-side assertion every call of the device raises: the process ends with that, and nobody waits."""

import subprocess
import sys
import textwrap
import threading

import pytest

from hf_slideformer.memory import streams
from tests.engine import small

pytestmark = pytest.mark.timeout(60)  # whoever waits for ever

MESSAGE = "device-side assert triggered"


class _Device:
    """Stands in for the CPU's streams and events until it breaks, after a number of calls."""

    def __init__(self, patch, calls):
        self.left = calls
        self._lock = threading.Lock()
        for owner, names in (
            (streams.CpuEvent, ("query", "synchronize", "wait")),
            (streams.CpuStream, ("wait", "record", "synchronize")),
        ):
            for name in names:
                patch.setattr(owner, name, self._breaking(getattr(owner, name)))

    def _breaking(self, original):
        def call(*args):
            with self._lock:
                self.left -= 1
            if self.left < 0:
                raise RuntimeError(MESSAGE)
            return original(*args)

        return call


@pytest.mark.parametrize("calls", [0, 7, 20])
@pytest.mark.parametrize("mode", small.MODES)
def test_everything_ends(monkeypatch, tmp_path, mode, calls):
    threads = set(threading.enumerate())
    run = small.start(mode, tmp_path)
    small.step(run, mode, 0)
    run.engine.synchronize()
    with monkeypatch.context() as patch:
        _Device(patch, calls)
        with pytest.raises(Exception, match=MESSAGE):
            _train(run, mode)
        try:
            run.engine.reset()
        except Exception as error:
            assert MESSAGE in str(error) or "overlapped" in str(error)  # noqa: PT017 - it may also work
        run.engine.close()
    assert not [thread for thread in set(threading.enumerate()) - threads if "slideformer" in thread.name]


def _train(run, mode):
    for number in range(1, 4):
        small.step(run, mode, number)


def test_a_process_ends_with_the_first_error():
    script = textwrap.dedent(
        """
        import sys
        import pytest
        from tests.engine import small
        from tests.faults.test_dead_device import _Device, _train

        run = small.start("overlapped outside in RAM")
        small.step(run, "overlapped outside in RAM", 0)
        _Device(pytest.MonkeyPatch(), 9)
        print("broken from here on", flush=True)
        try:
            _train(run, "overlapped outside in RAM")
        except Exception:
            try:
                run.engine.reset()
            except Exception as error:
                print("reset:", error)
            raise
        """
    )
    command = [sys.executable, "-W", "ignore", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{script}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "broken from here on" in done.stdout
    assert done.returncode == 1
    assert MESSAGE in done.stderr.strip().splitlines()[-1]
    assert "Exception ignored" not in done.stderr
