#!/usr/bin/env bash
# uvicorn 0.54.0: with httptools, what an application writes into `scope["method"]` decides how the response is framed.
#
# Guess before looking: the scope describes the request to the application; the server knows by itself that it answers a HEAD. So a
# middleware that lets the routes of GET answer HEAD may set `scope["method"] = "GET"`, as it may set `scope["path"]`.
# Seen: with httptools, which `uvicorn[standard]` installs and then prefers, the server looks into the same dict again when the
# response is sent, takes the HEAD for a GET, and writes the body onto the connection, where a client that keeps it open
# reads these bytes as the start of the next response. With h11 (plain `uvicorn`) nothing is seen: h11 remembers the request
# itself. So the fault depends on which packages are installed. A copy of the scope is right in both.
# Met: answering HEAD for all routes of GET.
#
# Output seen:
#   h11        in place: 0 bytes after the headers of HEAD    a copy: 0 bytes
#   httptools  in place: 5 bytes after the headers of HEAD    a copy: 0 bytes
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check uvicorn==0.54.0 httptools==0.9.0 h11==0.16.0
cd "$folder"
venv/bin/python -W error - <<'PYTHON'
import asyncio
import socket

import uvicorn


async def app(scope, receive, send):
    assert scope["method"] == "GET"
    headers = [(b"content-length", b"5")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"hello"})


async def in_place(scope, receive, send):
    if scope["method"] == "HEAD":
        scope["method"] = "GET"
    await app(scope, receive, send)


async def a_copy(scope, receive, send):
    if scope["method"] == "HEAD":
        scope = {**scope, "method": "GET"}
    await app(scope, receive, send)


async def bytes_after_headers(application, http):
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(application, http=http, lifespan="off", log_level="critical")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    reader, writer = await asyncio.open_connection(*listening.getsockname())
    writer.write(b"HEAD / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), 30)
    writer.close()
    server.should_exit = True
    await serving
    assert answer.startswith(b"HTTP/1.1 200"), answer
    return len(answer.partition(b"\r\n\r\n")[2])


async def main():
    for http, expected in (("h11", 0), ("httptools", 5)):
        wrong, right = [await bytes_after_headers(each, http) for each in (in_place, a_copy)]
        print(f"{http:10} in place: {wrong} bytes after the headers of HEAD    a copy: {right} bytes")
        assert (wrong, right) == (expected, 0), "another way of reading the method"


asyncio.run(main())
PYTHON
