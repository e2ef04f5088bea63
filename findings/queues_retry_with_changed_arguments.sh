#!/usr/bin/env bash
# huey 3.5.4, saq 0.26.4, dramatiq 2.2.1, taskiq 0.13.0: a retry gets the arguments as the failed attempt left them.
#
# Guess before looking: the arguments are in the stored message, so each attempt gets what the caller sent, perhaps with one
# exception among the libraries.
# Seen: four of these five write the message anew from the objects that the failed attempt held, so a handler that starts with
# `mail.pop("kind")` or `items.append(...)` finds it popped or appended, in a file of SQLite (huey), in Redis (saq, dramatiq) and
# in memory (taskiq) alike. Only arq reads the stored job again. Nothing of this is seen while the first attempt succeeds.
# Met: giving a second attempt the state that the first one began with.
#
# Output seen (keys of the argument at each attempt):
#   huey       kind+to | to | to
#   saq        kind+to | to | to
#   dramatiq   kind+to | to | to
#   taskiq     kind+to | to | to
#   arq        kind+to | kind+to | kind+to
set -euo pipefail
folder=$(mktemp -d)
trap 'redis-cli -s "$folder/redis" shutdown nosave >"$folder/log" 2>&1 || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    huey==3.5.4 saq==0.26.4 dramatiq==2.2.1 taskiq==0.13.0 arq==0.28.0 redis==5.3.1
redis-server --port 0 --unixsocket "$folder/redis" --save '' --dir "$folder" --daemonize yes >"$folder/log"
until redis-cli -s "$folder/redis" ping >"$folder/log" 2>&1; do sleep 0.1; done
cd "$folder"
cat >run.py <<'PYTHON'
import asyncio
import logging
import threading
from typing import Any

import arq
import dramatiq
import huey
import saq
import taskiq
from arq.connections import RedisSettings
from dramatiq.brokers.redis import RedisBroker
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from saq.queue.redis import RedisQueue

MAIL = {"kind": "greeting", "to": "bob"}
begun: list[str] = []


def attempt(mail: dict[str, str], error: Exception) -> bool:
    begun.append("+".join(sorted(mail)))
    mail.pop("kind", None)
    if len(begun) < 3:
        raise error
    return True


def run_huey() -> None:
    queue = huey.SqliteHuey(filename="huey.db")

    @queue.task(retries=2)
    def send(mail: dict[str, str]) -> None:
        attempt(mail, ConnectionError())

    send(dict(MAIL))
    while task := queue.dequeue():
        queue.execute(task)


def run_dramatiq() -> None:
    broker = RedisBroker(client=Redis(unix_socket_path="redis"), namespace="dramatiq")
    done = threading.Event()

    @dramatiq.actor(broker=broker, max_retries=2, min_backoff=1, max_backoff=1)
    def send(mail: dict[str, str]) -> None:
        if attempt(mail, ConnectionError()):
            done.set()

    worker = dramatiq.Worker(broker, worker_threads=1)
    worker.start()
    send.send(dict(MAIL))
    assert done.wait(60)
    worker.stop()


async def run_saq() -> None:
    async def send(context: Any, *, mail: dict[str, str]) -> None:
        attempt(mail, ConnectionError())

    queue = RedisQueue(AsyncRedis(unix_socket_path="redis"), name="saq")
    await queue.connect()
    worker = saq.Worker(queue, functions=[("send", send)])
    running = asyncio.create_task(worker.start())
    job = await queue.enqueue("send", mail=dict(MAIL), retries=3)
    await job.refresh(60)
    await worker.stop()
    await running


async def run_taskiq() -> None:
    broker = taskiq.InMemoryBroker().with_middlewares(taskiq.SimpleRetryMiddleware())
    done = asyncio.Event()

    @broker.task(retry_on_error=True, max_retries=3)
    async def send(mail: dict[str, str]) -> None:
        if attempt(mail, ConnectionError()):
            done.set()

    await broker.startup()
    await send.kiq(dict(MAIL))
    await asyncio.wait_for(done.wait(), 60)
    await broker.shutdown()


async def run_arq() -> None:
    async def send(context: Any, mail: dict[str, str]) -> None:
        attempt(mail, arq.Retry())

    settings = RedisSettings(unix_socket_path="redis")
    pool = await arq.create_pool(settings)
    await pool.enqueue_job("send", dict(MAIL))
    worker = arq.Worker([arq.func(send, name="send")], redis_pool=pool, burst=True, handle_signals=False, poll_delay=0.1)
    await worker.main()
    await worker.close()


logging.disable()
CHANGED, SENT = ["kind+to", "to", "to"], ["kind+to"] * 3
RUNS = (("huey", run_huey, CHANGED), ("saq", run_saq, CHANGED), ("dramatiq", run_dramatiq, CHANGED))
for name, run, expected in (*RUNS, ("taskiq", run_taskiq, CHANGED), ("arq", run_arq, SENT)):
    begun.clear()
    if asyncio.iscoroutinefunction(run):
        asyncio.run(run())
    else:
        run()
    print(f"{name:10} {' | '.join(begun)}")
    assert begun == expected, f"the version of {name} named above gave {expected}"
PYTHON
venv/bin/python run.py
