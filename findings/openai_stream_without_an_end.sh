#!/usr/bin/env bash
# openai 3.57.0: a streamed chat completion whose server closes the response in good order before the model has finished
# (a proxy or an engine that is shut down between two events) ends the loop as a whole answer does, though neither a
# finish_reason nor "data: [DONE]" has come; the `stream` helper returns it as the final completion. Expected: an error,
# as for the same answer cut inside the transfer, which raises. Half an answer passes for a whole one unless the caller
# looks at finish_reason.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet openai==3.57.0 2>/dev/null
cd "$work"
env -u HTTP_PROXY -u http_proxy -u ALL_PROXY -u all_proxy venv/bin/python - <<'PY'
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai


class Server(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def event(self, text):
        data = f"data: {text}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def choice(self, delta, finish_reason=None):
        choices = [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
        about = {"id": "a", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        self.event(json.dumps({**about, "choices": choices}))

    def do_POST(self):
        kind = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["model"]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.choice({"role": "assistant", "content": "A cat on"})
        if kind == "whole":
            self.choice({"content": " a sofa."})
            self.choice({}, "stop")
            self.event("[DONE]")
        if kind != "cut":
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True


def loop(client, asked):
    text, reason = "", None
    for chunk in client.chat.completions.create(**asked, stream=True):
        text += chunk.choices[0].delta.content or ""
        reason = chunk.choices[0].finish_reason or reason
    return text, reason


def helper(client, asked):
    with client.chat.completions.stream(**asked) as stream:
        choice = stream.get_final_completion().choices[0]
    return choice.message.content, choice.finish_reason


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none", max_retries=0)
print("openai", openai.__version__)
seen = {}
for kind in ("whole", "ended early", "cut"):
    for ask in (loop, helper):
        try:
            answer = ask(client, {"model": kind, "messages": [{"role": "user", "content": "What is it?"}]})
        except Exception as error:
            answer = type(error).__name__
        seen[kind, ask.__name__] = answer
        print(f"{kind}, {ask.__name__}:", answer)
server.shutdown()
whole, half = ("A cat on a sofa.", "stop"), ("A cat on", None)
assert all(seen["whole", way] == whole and seen["ended early", way] == half for way in ("loop", "helper"))
assert all(isinstance(seen["cut", way], str) for way in ("loop", "helper"))
PY
