"""The protocol of llama.cpp's server, spoken with a small server of the same form."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from mmr5_bench.peers.base import ListWork, PeerError, Setting, WorkMismatchError, check
from mmr5_bench.peers.llama_server import LlamaServerPeer
from mmr5_bench.peers.prompts import PromptReader
from mmr5_bench.peers.workloads import Workload
from mmr5_runtime.prompt import load_template, render

ANSWER = "<think>Two pages.</think><answer>[2, 1]</answer>"


@cache
def work() -> ListWork:
    return Workload("small", 2, 40, PromptReader.from_random("tiny")).list(0)


@dataclass
class Served:
    """What the server got, and what it is to reply."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    status: int = 200
    reply: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def served() -> Iterator[Served]:
    state = Served(
        reply={
            "choices": [{"message": {"role": "assistant", "content": ANSWER}}],
            "usage": {"prompt_tokens": len(work().prompt_ids), "completion_tokens": 17},
            "timings": {"prompt_ms": 2.0, "predicted_ms": 0.25},
        }
    )

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({"status": "ok"} if self.path == "/health" else {}, 200)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.bodies.append({"path": self.path, **json.loads(body)})
            self._send(state.reply, state.status)

        def _send(self, document: dict[str, Any], status: int) -> None:
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def test_asks_with_the_reference_prompt_and_the_files_themselves(served: Served) -> None:
    peer, setting = LlamaServerPeer(), Setting(llama_server=served.url)
    assert peer.why_not(setting) is None
    with peer.open(setting) as session:
        answer = session.answer(work())
        reading = session.reading(work(), pixels=True)
    check(work(), answer, reading, None)
    assert (answer.order, answer.status, answer.tokens) == ((1, 0), "ok", 17)
    assert answer.stages_ms["prefill"] == 2.0 and (answer.ttft_ms or 0) > 0

    [body] = served.bodies
    assert body["path"] == "/v1/chat/completions"
    assert (body["temperature"], body["cache_prompt"], body["stream"]) == (0.0, False, False)
    assert (body["max_tokens"], body["reasoning_format"]) == (40, "none")
    system, user = body["messages"]
    images = [part["image_url"]["url"] for part in user["content"] if part["type"] == "image_url"]
    sent = [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in images]
    assert sent == list(work().pages)
    template = load_template()
    texts = [
        part["text"] if part["type"] == "text" else template.image(1) for part in user["content"]
    ]
    whole = (
        f"{template.message_start.format(role='system')}{system['content']}{template.message_end}"
        f"{template.message_start.format(role='user')}{''.join(texts)}"
        f"{template.tail(work().question, 2)}"
    )
    assert whole == render(work().question, 2)


def test_another_number_of_prompt_tokens_is_reported(served: Served) -> None:
    served.reply["usage"]["prompt_tokens"] += 3
    with LlamaServerPeer().open(Setting(llama_server=served.url)) as session:
        answer = session.answer(work())
        with pytest.raises(WorkMismatchError, match="prompt tokens instead of"):
            check(work(), answer, session.reading(work(), pixels=False), None)


def test_errors_of_the_server_say_what_happened(served: Served) -> None:
    with LlamaServerPeer().open(Setting(llama_server=served.url)) as session:
        served.status, served.reply = 500, {"error": {"message": "image too large"}}
        with pytest.raises(PeerError, match="500.*image too large"):
            session.answer(work())
        served.status, served.reply = 200, {"choices": []}
        with pytest.raises(PeerError, match="no chat completion"):
            session.answer(work())


def test_a_server_that_is_not_there_is_a_reason(served: Served) -> None:
    peer = LlamaServerPeer()
    assert "does not answer" in (peer.why_not(Setting(llama_server="http://127.0.0.1:9")) or "")
    assert "no address" in (peer.why_not(Setting(llama_server="localhost")) or "")
    assert "random" in (peer.why_not(Setting(llama_server=served.url, random="tiny")) or "")
