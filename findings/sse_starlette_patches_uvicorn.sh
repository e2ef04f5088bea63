#!/usr/bin/env bash
# sse-starlette 3.7.0: importing it replaces a method of uvicorn's Server class.
#
# Guess before looking: a package with one response class changes nothing until a response is made.
# Seen: `import sse_starlette` assigns its own function to `uvicorn.Server.handle_exit`, the handler of SIGTERM and SIGINT,
# for the process. A subclass of `Server` that defines the method itself is not affected, so whether event streams
# learn of the shutdown depends on who runs the server, and a library that imports the package changes the signals of every application
# that imports the library.
# Met: choosing a response class for server-sent events in a library that other people's servers import.
#
# Output seen:
#   before: uvicorn.server Server.handle_exit
#   after:  sse_starlette.sse AppStatus.handle_exit
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check sse-starlette==3.7.0 uvicorn==0.54.0
"$folder/venv/bin/python" - <<'PYTHON'
import uvicorn


def handler() -> str:
    method = uvicorn.Server.handle_exit
    return f"{method.__module__} {method.__qualname__}"


before = handler()
import sse_starlette  # noqa: E402, F401

after = handler()
print(f"before: {before}\nafter:  {after}")
assert before == "uvicorn.server Server.handle_exit"
assert after == "sse_starlette.sse AppStatus.handle_exit", "version 3.7.0 replaced the method"
PYTHON
