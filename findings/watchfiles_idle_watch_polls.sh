#!/usr/bin/env bash
# watchfiles 1.3.0: a watch of a folder in which nothing happens wakes up every `step` milliseconds, for ever.
#
# Guess before looking: the kernel's events wake it, and `rust_timeout` where none come: once a minute as it is called here. `step` is said to be
# the time to wait for more changes after the first ones, so it should not matter in a quiet folder.
# Seen: `step` is the period at which the thread looks whether events have arrived. With 10 ms it wakes about 100 times a second (and takes
# the interpreter's lock each time, to look for signals), with the default of 50 ms about 20 times; `rust_timeout` makes no difference. The kernel's events only fill a
# list in another thread.
# Met: a server with an idle watcher that was never idle, and whose event loop gave its lock away a hundred times a second.
#
# Output seen (Linux; a busy machine shows fewer):
#   step   10 ms:  285 wake-ups in 3 s
#   step   50 ms:   60 wake-ups in 3 s
#   step 1000 ms:    3 wake-ups in 3 s
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check watchfiles==1.3.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

from watchfiles import watch

folder = Path(sys.argv[1]) / "quiet"
folder.mkdir()
print(f"watchfiles {version('watchfiles')}")


def wakes(thread: int) -> int:
    """How often the kernel has let a thread sleep."""
    status = Path(f"/proc/self/task/{thread}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def measured(step: int) -> int:
    over = threading.Event()

    def follow() -> None:
        for _ in watch(folder, step=step, rust_timeout=60_000, stop_event=over):
            raise AssertionError("nothing happens in this folder")

    thread = threading.Thread(target=follow)
    thread.start()
    time.sleep(1.0)
    before = wakes(thread.native_id)
    time.sleep(3.0)
    count = wakes(thread.native_id) - before
    over.set()
    thread.join()
    print(f"step {step:4} ms: {count:4} wake-ups in 3 s")
    return count


fast, usual, slow = measured(10), measured(50), measured(1000)
assert slow <= 6, "with a step of a second it hardly wakes"
assert fast >= 10 * slow, "the step no longer decides how often an idle watch wakes"
assert usual >= 3 * slow, "the step no longer decides how often an idle watch wakes"
PYTHON
