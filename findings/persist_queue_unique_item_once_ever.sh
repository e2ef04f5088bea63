#!/usr/bin/env bash
# persist-queue 1.1.0: an item that a UniqueAckQ has seen once can never be put again, not even after it was acknowledged.
#
# Guess before looking: items are unique among those that wait or are being worked on; `ack` ends that, as it does in `UniqueQ`.
# Seen: `ack` marks the row and leaves it in the table, whose data are unique, so `put` of an equal item returns None, raises
# nothing and queues nothing, in a new process too. An item given up by `ack_failed` is refused in the same way. Only
# `clear_acked_data` ends it, which nothing calls by itself and which keeps the 1,000 latest unless told otherwise, and
# what it deletes is decided by count and not by age.
# Met: looking for how long peers keep a dedupe key.
#
# Output seen:
#   put, get, ack; put again                     UniqueAckQ None, size 0
#   opened anew; put again                       UniqueAckQ None, size 0
#   clear_acked_data(); put again                UniqueAckQ None, size 0
#   clear_acked_data(keep_latest=0); put again   UniqueAckQ queued, size 1
#   put, get, ack_failed; put again              UniqueAckQ None, size 0
#   put, get, task_done; put again               UniqueQ    queued, size 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check persist-queue==1.1.0
cd "$folder"
venv/bin/python - <<'PYTHON'
from persistqueue import UniqueAckQ, UniqueQ


def put_again(what: str, queue: UniqueAckQ | UniqueQ, expected: str) -> None:
    row = queue.put("rebuild the index")
    found = f"{'None' if row is None else 'queued'}, size {queue.size}"
    print(f"{what + '; put again':44} {type(queue).__name__:10} {found}")
    assert found == expected, f"version 1.1.0: {expected}"


queue = UniqueAckQ("acked")
queue.put("rebuild the index")
queue.ack(queue.get())
put_again("put, get, ack", queue, "None, size 0")
queue.close()
queue = UniqueAckQ("acked")
put_again("opened anew", queue, "None, size 0")
queue.clear_acked_data()
put_again("clear_acked_data()", queue, "None, size 0")
queue.clear_acked_data(keep_latest=0)
put_again("clear_acked_data(keep_latest=0)", queue, "queued, size 1")
failed = UniqueAckQ("failed")
failed.put("rebuild the index")
failed.ack_failed(failed.get())
put_again("put, get, ack_failed", failed, "None, size 0")
plain = UniqueQ("plain")
plain.put("rebuild the index")
plain.get()
plain.task_done()
put_again("put, get, task_done", plain, "queued, size 1")
PYTHON
