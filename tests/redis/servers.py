"""Real Redis servers for tests, each a process of its own on a free port."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

SERVER = os.environ.get("AGENT_STATE_REDIS_SERVER", "redis-server")
"""The program: also ``valkey-server``, or the path of another version."""


class RedisServer:
    """One server, its files in ``folder``. It can be killed, stopped and started again."""

    def __init__(self, folder: Path, *arguments: str, port: int | None = None) -> None:
        assert shutil.which(SERVER), f"{SERVER} is not installed: make test installs it"
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, on the same port and with the same files; returns when it answers."""
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(self._command(), stdout=log, stderr=log)
        until = time.monotonic() + 60
        while not self._answers():
            assert self._process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
            assert time.monotonic() < until, "the server does not answer"
            time.sleep(0.01)

    def _command(self) -> list[str]:
        command = [SERVER, "--port", str(self.port), "--dir", str(self.folder), "--save", ""]
        return [*command, "--bind", "127.0.0.1", "--appendonly", "no", *self._arguments]

    def ask(self, *words: str) -> str:
        """What redis-cli prints as the reply."""
        command = ["redis-cli", "-h", "127.0.0.1", "-p", str(self.port), *words]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return asked.stdout.strip()

    def until(self, word: str, *words: str) -> None:
        """Ask until the reply holds the word. Who is promoted closes its connections: ask again."""
        until = time.monotonic() + 60
        while word not in (reply := self._reply(*words)):
            assert time.monotonic() < until, f"{words}: no {word!r} in {reply!r}"
            time.sleep(0.02)

    def _reply(self, *words: str) -> str:
        try:
            return self.ask(*words)
        except subprocess.CalledProcessError as error:
            return f"{error.stdout}{error.stderr}"

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64)[:1] in {b"+", b"-"}  # -NOAUTH is an answer too
        except OSError:
            return False

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        """SIGSTOP: it accepts connections and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL. What it held in memory alone is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """Kill it and start it on the same port."""
        self.kill()
        self.start()


class ThreeNodes:
    """A Redis Cluster of three masters."""

    def __init__(self, folder: Path) -> None:
        settings = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
        self.nodes = [
            RedisServer(folder / f"node-{n}", *settings, port=free_port(below=55536))
            for n in range(3)
        ]
        places = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        self.url = f"redis+cluster://{places}"

    def start(self) -> None:
        """Returns when every node knows that all is well."""
        for node in self.nodes:
            node.start()
        places = [f"127.0.0.1:{node.port}" for node in self.nodes]
        self.nodes[0].ask("--cluster", "create", *places, "--cluster-yes")
        for node in self.nodes:
            node.until("cluster_state:ok", "cluster", "info")
            node.until("cluster_known_nodes:3", "cluster", "info")

    def owner(self, key: str) -> RedisServer:
        """The node that has the key's slot."""
        slot = int(self.nodes[0].ask("cluster", "keyslot", key))
        for node in self.nodes:
            first, last = self._slots(node)
            if first <= slot <= last:
                return node
        raise AssertionError(f"nobody has slot {slot}")

    @staticmethod
    def _slots(node: RedisServer) -> tuple[int, int]:
        [mine] = [line for line in node.ask("cluster", "nodes").splitlines() if "myself" in line]
        first, _, last = mine.split()[8].partition("-")
        return int(first), int(last)

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()


class Sentinel(RedisServer):
    """One sentinel, which watches one master under the name ``main``."""

    def __init__(self, folder: Path, master: RedisServer, quorum: int) -> None:
        super().__init__(folder)
        (folder / "sentinel.conf").write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor main 127.0.0.1 {master.port} {quorum}\n"
            "sentinel down-after-milliseconds main 500\n"
            "sentinel failover-timeout main 2000\n"
        )

    def _command(self) -> list[str]:
        return [SERVER, str(self.folder / "sentinel.conf"), "--sentinel"]


class Guarded:
    """A master and a replica, and three sentinels that put the one in the other's place."""

    def __init__(self, folder: Path) -> None:
        self.master = RedisServer(folder / "master")
        following = ("--replicaof", "127.0.0.1", str(self.master.port))
        self.replica = RedisServer(
            folder / "replica", *following, "--repl-diskless-sync-delay", "0"
        )
        self.sentinels = [Sentinel(folder / f"sentinel-{n}", self.master, 2) for n in range(3)]
        places = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        self.url = f"redis+sentinel://{places}/main"

    def start(self) -> None:
        """Returns when the replica follows and the sentinels know each other and the replica."""
        self.master.start()
        self.master.ask("config", "set", "repl-diskless-sync-delay", "0")
        self.replica.start()
        self.replica.until("master_link_status:up", "info", "replication")
        for sentinel in self.sentinels:
            sentinel.start()
        for sentinel in self.sentinels:
            sentinel.until("slaves=1,sentinels=3", "info", "sentinel")

    def until_promoted(self) -> None:
        """Wait until all sentinels name the replica as the master."""
        self.replica.until("role:master", "info", "replication")
        for sentinel in self.sentinels:
            sentinel.until(str(self.replica.port), "sentinel", "get-master-addr-by-name", "main")

    def kill(self) -> None:
        for one in (*self.sentinels, self.replica, self.master):
            one.kill()


def free_port(*, below: int = 65536) -> int:
    """A port that nobody uses, with room for a cluster's second one if it is below 55536."""
    while True:
        port = _free_port()
        if port < below:
            return port


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
