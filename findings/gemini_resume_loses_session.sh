#!/usr/bin/env bash
# @google/gemini-cli 0.61.0: a session that was resumed in a later minute is deleted when the next one starts.
#
# Guess before looking: --resume goes on in the session's file, and a later session leaves it alone.
# Seen: the resumed run also makes a second file, named by the present minute and the same eight digits of the session
# id. The next run that starts a new session deletes both files, without a word, so all of the conversation is gone.
# A session that was resumed within the minute of its start has one file, and stays.
# Met: driving the tool headless against a local model, to see what its transcripts hold: the first session was missing.
#
# Output seen:
#   first session:     ['session-2026-11-30T23-04-78a4891e.jsonl']
#   resumed later:     ['session-2026-11-30T23-04-78a4891e.jsonl', 'session-2026-11-30T23-05-78a4891e.jsonl']
#   another session:   ['session-2026-11-30T23-06-f2fadc8b.jsonl']
# Needs node 20 and npm; waits for the next minute.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
npm install --silent --no-audit --no-fund --prefix "$folder" @google/gemini-cli@0.61.0
python3 - "$folder" <<'PYTHON'
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

folder = Path(sys.argv[1])
usage = {"promptTokenCount": 5, "candidatesTokenCount": 5, "totalTokenCount": 10}
said = {"content": {"role": "model", "parts": [{"text": "Yes."}]}, "finishReason": "STOP", "index": 0}
answer = {"candidates": [said], "usageMetadata": usage}


class Model(BaseHTTPRequestHandler):
    """Answers every request with one word."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        body = f"data: {json.dumps(answer)}\n\n".encode()
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
threading.Thread(target=server.serve_forever, daemon=True).start()
home = folder / "home"
(home / ".gemini").mkdir(parents=True)
settings = {"security": {"auth": {"selectedType": "gemini-api-key"}}}
settings |= {"privacy": {"usageStatisticsEnabled": False}, "general": {"disableAutoUpdate": True}}
(home / ".gemini" / "settings.json").write_text(json.dumps(settings))
work = folder / "work"
work.mkdir()
variables = {
    "PATH": os.environ["PATH"],
    "HOME": str(home),
    "GEMINI_API_KEY": "none",
    "GOOGLE_GEMINI_BASE_URL": f"http://127.0.0.1:{server.server_port}",
    "GEMINI_CLI_TRUST_WORKSPACE": "true",
}


def ask(question: str, *more: str) -> list[Path]:
    command = [str(folder / "node_modules/.bin/gemini"), "-p", question, "-m", "gemini-2.5-flash", *more]
    subprocess.run(command, cwd=work, env=variables, input=b"", capture_output=True, check=True)
    return sorted((home / ".gemini" / "tmp" / "work" / "chats").glob("session-*"))


def holding(files: list[Path], question: str) -> list[str]:
    return [path.name for path in files if question in path.read_text()]


first = ask("Is the lamp on?")
assert holding(first, "Is the lamp on?")
print("first session:    ", [path.name for path in first], flush=True)
time.sleep(61 - time.time() % 60)
resumed = ask("And the door?", "--resume", "latest")
print("resumed later:    ", [path.name for path in resumed])
assert holding(resumed, "Is the lamp on?") and holding(resumed, "And the door?")
other = ask("What time is it?")
print("another session:  ", [path.name for path in other])
assert len(resumed) == 2 and resumed[0].name[-13:] == resumed[1].name[-13:], "one id, two files"
assert not holding(other, "Is the lamp on?"), "version 0.61.0 deleted the conversation"
PYTHON
