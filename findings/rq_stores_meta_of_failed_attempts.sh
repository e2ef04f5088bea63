#!/usr/bin/env bash
# RQ 3.0.0: a job's `meta` is stored when the attempt failed and will be retried, and is dropped when it succeeded.
#
# Guess before looking: without `save_meta()` nothing that a job writes into its `meta` is stored.
# Seen: an attempt that ends well, or ends the job as failed, stores nothing of it. An attempt that failed and is retried stores it
# all: the next attempt reads what the failed one wrote. A job that counts in `meta` and succeeds at its third attempt
# shows 2, and a mark "done" that is set before a call that fails is seen by the retry, which then skips the call.
# Met: comparing how task queues undo a failed attempt.
#
# Output seen (meta after the job):
#   succeeds at once           finished  {}
#   fails, no retry            failed    {}
#   succeeds at attempt 3      finished  {'attempts': 2}
#   marks, then fails once     finished  {'sent': True}, mails sent: 0
set -euo pipefail
folder=$(mktemp -d)
trap 'redis-cli -s "$folder/redis" shutdown nosave >"$folder/log" 2>&1 || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check rq==3.0.0
redis-server --port 0 --unixsocket "$folder/redis" --save '' --dir "$folder" --daemonize yes >"$folder/log"
until redis-cli -s "$folder/redis" ping >"$folder/log" 2>&1; do sleep 0.1; done
cd "$folder"
cat >jobs.py <<'PYTHON'
from pathlib import Path

from rq import get_current_job


def count(fail_until: int) -> None:
    meta = get_current_job().meta
    meta["attempts"] = meta.get("attempts", 0) + 1
    if meta["attempts"] < fail_until:
        raise ConnectionError("no answer")


def send() -> None:
    meta = get_current_job().meta
    if not meta.get("sent"):
        meta["sent"] = True
        if not Path("server_is_up").exists():
            Path("server_is_up").touch()
            raise ConnectionError("no answer")
        with Path("mails").open("a") as mails:
            mails.write("one mail\n")
PYTHON
cat >run.py <<'PYTHON'
from pathlib import Path
from typing import Any

import jobs
from redis import Redis
from rq import Queue, Retry, Worker
from rq.job import Job

redis = Redis(unix_socket_path="redis")

def run(function: Any, *args: Any, retry: Retry | None = None) -> tuple[str, dict[str, Any]]:
    queue = Queue(connection=redis)
    job_id = queue.enqueue(function, *args, retry=retry).id
    Worker([queue], connection=redis).work(burst=True, logging_level="CRITICAL")
    job = Job.fetch(job_id, connection=redis)
    return job.get_status().value, job.meta


CASES = {
    "succeeds at once": ((jobs.count, 0), None, ("finished", {})),
    "fails, no retry": ((jobs.count, 9), None, ("failed", {})),
    "succeeds at attempt 3": ((jobs.count, 3), Retry(max=5), ("finished", {"attempts": 2})),
    "marks, then fails once": ((jobs.send,), Retry(max=5), ("finished", {"sent": True})),
}
for name, (call, retry, expected) in CASES.items():
    found = run(*call, retry=retry)
    mails = f", mails sent: {int(Path('mails').exists())}" if call == (jobs.send,) else ""
    print(f"{name:26} {found[0]:9} {found[1]}{mails}")
    assert found == expected, f"version 3.0.0 left {expected}"
assert not Path("mails").exists(), "version 3.0.0 showed the retry the mark of the attempt that failed"
PYTHON
venv/bin/python run.py
