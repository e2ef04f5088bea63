#!/usr/bin/env bash
# opencode-ai 1.18.33: `opencode stats` counts what a fork repeats as used again.
#
# Guess before looking: a fork costs what is asked in it; its past was paid for once.
# Seen: the fork's row in the table `session` starts with the tokens (and the cost) of all messages that were copied, and its
# messages are copies with new ids. `opencode stats` adds up the rows, so each fork doubles its past: tokens, cost, tool calls.
# Met: comparing the tokens that an importer found with those that the tool reports.
#
# Output seen:
#   the model was asked for 3 answers, 300 tokens
#   sessions: [('Lamp', 200), ('Lamp (fork #1)', 300)]
#   opencode stats: Input 500
# Needs node 20 and npm.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
npm install --silent --no-audit --no-fund --prefix "$folder" opencode-ai@1.18.33
python3 - "$folder" <<'PYTHON'
import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

folder = Path(sys.argv[1])
answered = 0


class Model(BaseHTTPRequestHandler):
    """Answers every request with one word and 100 tokens of input."""

    def do_POST(self) -> None:
        global answered
        request = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)))
        answered += bool(request.get("tools"))  # a request without tools is for a title
        head = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m1"}
        said = {"index": 0, "delta": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
        events = [{**head, "choices": [said]}, {**head, "choices": [], "usage": usage}]
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
threading.Thread(target=server.serve_forever, daemon=True).start()
home, work = folder / "home", folder / "work"
work.mkdir()
options = {"baseURL": f"http://127.0.0.1:{server.server_port}/v1", "apiKey": "none"}
provider = {"npm": "@ai-sdk/openai-compatible", "options": options, "models": {"m1": {"name": "m1"}}}
config = {"autoupdate": False, "model": "local/m1", "small_model": "local/m1", "provider": {"local": provider}}
(home / ".config" / "opencode").mkdir(parents=True)
(home / ".config" / "opencode" / "opencode.json").write_text(json.dumps(config))
variables = {"PATH": os.environ["PATH"], "HOME": str(home), "TERM": "dumb"}


def opencode(*words: str) -> str:
    command = [str(folder / "node_modules/.bin/opencode"), *words]
    done = subprocess.run(command, cwd=work, env=variables, input=b"", capture_output=True, check=True)
    return done.stdout.decode()


opencode("run", "--title", "Lamp", "On?")
opencode("run", "--continue", "Still?")
base = sqlite3.connect(f"file:{home}/.local/share/opencode/opencode.db?mode=ro", uri=True)
(session,) = base.execute("select id from session").fetchone()
opencode("run", "--session", session, "--fork", "Door?")
print(f"the model was asked for {answered} answers, {100 * answered} tokens")
rows = base.execute("select title, tokens_input from session order by time_created").fetchall()
print("sessions:", rows)
shown = re.search(r"Input\s+([\d.K]+)", opencode("stats"))
print("opencode stats: Input", shown and shown[1])
assert answered == 3
assert [tokens for _, tokens in rows] == [200, 300], "version 1.18.33 copies the counters too"
assert shown and shown[1] == "500", "version 1.18.33 adds them up"
PYTHON
