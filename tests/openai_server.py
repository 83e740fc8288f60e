"""A small server of the OpenAI chat protocol over a real model, with faults on demand, for the tests of `served`."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from workbench.models import LM

Fault = tuple[int, dict[str, str], bytes] | str  # an answer in place of the model's, or "drop"


@dataclass
class State:
    """What the server saw: request bodies, times, keys, and how many were under way at once."""

    bodies: list[dict] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def serving(
    lm: LM, fault: Callable[[int, dict], Fault | None] = lambda number, body: None
) -> Iterator[tuple[str, State]]:
    """The url and state of a server that answers with `lm`; `fault(number, body)` may spoil request `number`."""
    state = State()
    model_lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, {}, json.dumps({"object": "list", "data": [{"id": "lab", "object": "model"}]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                number = len(state.bodies)
                state.bodies.append(body)
                state.times.append(time.monotonic())
                state.keys.append(self.headers.get("Authorization"))
                state.under_way += 1
                state.most_under_way = max(state.most_under_way, state.under_way)
            try:
                spoilt = fault(number, body)
                if spoilt == "drop":
                    self.connection.close()
                elif spoilt is not None:
                    self.reply(*spoilt)
                else:
                    self.answer(body)
            finally:
                with state.lock:
                    state.under_way -= 1

        def answer(self, body: dict) -> None:
            time.sleep(0.01)
            with model_lock:
                (found,) = lm.generate([body["messages"]], max_new_tokens=body["max_tokens"], seed=[body["seed"]],
                                       temperature=body["temperature"], top_p=body["top_p"])  # fmt: skip
            choice = {"index": 0, "message": {"role": "assistant", "content": found.text},
                      "finish_reason": "stop" if found.finished else "length"}  # fmt: skip
            usage = {"prompt_tokens": found.tokens_in, "completion_tokens": found.tokens_out}
            self.reply(200, {}, json.dumps({"id": "x", "choices": [choice], "usage": usage}).encode())

        def reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None  # type: ignore[method-assign]  # a dropped connection is meant
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
