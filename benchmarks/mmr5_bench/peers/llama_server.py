"""A running ``llama-server`` (llama.cpp) as a contender, over its OpenAI chat completions.

Question and pages -> messages with images as data URLs -> POST /v1/chat/completions -> text and
counts. The protocol is tested against a server of the same form; no llama.cpp has been asked yet.
The server prepares images and prompt by itself and tells only how many tokens it read: a count
that differs from ours is reported as a mismatch and ends its part. Greedy, prompt cache off. Of
the checkpoint's generation settings it gets the repetition penalty, over the whole context.
"""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mmr5_bench.peers.base import Answer, ListWork, Peer, PeerError, Reading, Setting
from mmr5_bench.peers.prompts import encode_png, message_parts
from mmr5_bench.peers.reference_answer import read_as_reference
from mmr5_bench.peers.vllm_offline import repetition_penalty
from mmr5_runtime.image import planned_sizes

HEALTH_SECONDS, ANSWER_SECONDS = 3.0, 600.0


@dataclass(frozen=True)
class LlamaServerPeer(Peer):
    """Whatever model the server at ``setting.llama_server`` has loaded."""

    @property
    def name(self) -> str:
        return "llama.cpp"

    def subject(self, setting: Setting) -> str:
        return "llama.cpp server"

    def axes(self, setting: Setting) -> dict[str, Any]:
        return {"quant": "as served", "dtype": "as served", "stop": "eos"}

    def why_not(self, setting: Setting) -> str | None:
        url = setting.llama_server
        if url is None:
            return "no address was given; start llama-server and pass --llama-server URL"
        if not url.startswith(("http://", "https://")):
            return f"{url} is no address; pass --llama-server http://HOST:PORT"
        if setting.random is not None:
            return "llama.cpp serves a model file, not random weights; leave out --random"
        try:
            with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=HEALTH_SECONDS):
                return None
        except (OSError, ValueError) as error:
            return f"{url} does not answer ({error}); start llama-server there"

    @contextmanager
    def open(self, setting: Setting) -> Iterator[LlamaServerSession]:
        """PeerError when no address was given."""
        if setting.llama_server is None:
            raise PeerError(str(self.why_not(setting)))
        penalty = 1.0 if setting.checkpoint is None else repetition_penalty(setting.checkpoint)
        yield LlamaServerSession(setting.llama_server.rstrip("/"), penalty)


class LlamaServerSession:
    """The server, asked one list at a time."""

    def __init__(self, url: str, penalty: float = 1.0) -> None:
        self._url, self._penalty = url, penalty
        self._prompt_tokens = 0

    def forget(self) -> None:
        """Nothing to do: every request asks for an empty prompt cache."""

    def answer(self, work: ListWork) -> Answer:
        """PeerError for an HTTP error and for a reply that is no chat completion."""
        began = time.perf_counter()
        body = json.dumps(self._body(work)).encode()
        prepared = time.perf_counter()
        reply = self._post(body)
        total = 1e3 * (time.perf_counter() - began)
        try:
            text = str(reply["choices"][0]["message"]["content"])
            self._prompt_tokens = int(reply["usage"]["prompt_tokens"])
            tokens = int(reply["usage"]["completion_tokens"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise PeerError(
                f"{self._url} replied no chat completion with usage ({error!r}); "
                "point --llama-server at llama.cpp's server."
            ) from error
        order, status = read_as_reference(text, len(work.pages))
        stages = {"preprocess": 1e3 * (prepared - began)}
        ttft = None
        timings = reply.get("timings") or {}
        if "prompt_ms" in timings and "predicted_ms" in timings:
            stages |= {"prefill": timings["prompt_ms"], "decode": timings["predicted_ms"]}
            ttft = max(total - timings["predicted_ms"], 0.0)
        return Answer(text, order, status, tokens, ttft_ms=ttft, stages_ms=stages)

    def reading(self, work: ListWork, *, pixels: bool) -> Reading:
        """The server's count of prompt tokens; it shows nothing else."""
        return Reading(self._prompt_tokens)

    def _body(self, work: ListWork) -> dict[str, Any]:
        system, texts = message_parts(work.question, len(work.pages))
        content: list[dict[str, Any]] = []
        for text, page in zip(texts, work.pages, strict=True):
            image = base64.b64encode(_at_planned_size(page, work)).decode("ascii")
            url = {"url": f"data:image/png;base64,{image}"}
            content += [{"type": "text", "text": text}, {"type": "image_url", "image_url": url}]
        return {
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": content},
            ],
            "temperature": 0.0,
            "repeat_penalty": self._penalty,
            "repeat_last_n": -1,
            "max_tokens": work.max_new_tokens,
            "ignore_eos": work.forced,
            "cache_prompt": False,
            "reasoning_format": "none",  # else <think> is cut out of the text
            "stream": False,
        }

    def _post(self, body: bytes) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self._url}/v1/chat/completions",
            data=body,
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as reply:
                found = json.loads(reply.read())
        except urllib.error.HTTPError as error:
            detail = error.read().decode("utf-8", "replace")[:200]
            raise PeerError(f"{self._url} answered {error.code}: {detail}") from error
        except (OSError, ValueError) as error:
            raise PeerError(f"{self._url} did not answer ({error}); is it running?") from error
        if not isinstance(found, dict):
            raise PeerError(f"{self._url} replied {type(found).__name__}, no JSON object.")
        return found


def _at_planned_size(page: bytes, work: ListWork) -> bytes:
    """The file as it is, or resized as the reference resizes it, so that the server need not."""
    image: Image.Image = Image.open(io.BytesIO(page))
    sizes = planned_sizes(image.width, image.height, work.budget)
    if image.size == sizes[1] and image.format == "PNG":
        return page
    image = image.convert("RGB")
    for size in sizes:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return encode_png(image)
