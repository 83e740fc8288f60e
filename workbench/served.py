"""A model behind a server of the OpenAI protocol (vLLM, llama.cpp), for bulk sampling beside the in-process one.

`connect` gives an object with the `render` and `generate` that recipes use, so `synthesize(served, task, ...)` works as
with a loaded model. Requests run side by side under a rate limit, failed ones are tried again, and a cost limit stops
before it is passed. Every answer can be kept on disk by its request, so that nothing is paid for twice. Not covered:
interventions, log-probabilities, edits that need the model's tokens. Leans on httpx; the protocol's chat endpoint:
https://platform.openai.com/docs/api-reference/chat.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import httpx

from workbench.files import content_key, write_atomic
from workbench.generate import Generation

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # statuses of a request that may succeed later


class ServerError(ValueError):
    """A server that can't be used as asked; the message says what it answered and what to do."""


@dataclass
class Spent:
    """What went over the wire so far, answers from the cache not counted."""

    requests: int = 0
    retries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    dollars: float = 0.0


@dataclass(frozen=True)
class Served:
    """A served model; made by `connect`."""

    url: str
    name: str
    revision: str
    key: str | None = field(repr=False)
    workers: int
    tries: int
    timeout: float
    requests_per_minute: float | None
    max_dollars: float | None
    dollars_a_million: tuple[float, float]
    cache: Path | None
    spent: Spent = field(default_factory=Spent, compare=False)
    _held: list[float] = field(
        default_factory=lambda: [0.0], repr=False, compare=False
    )  # dollars, for what is in flight
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    _next: list[float] = field(default_factory=lambda: [0.0], repr=False, compare=False)

    def render(self, prompt: str | list[dict[str, str]]) -> str:
        """Chat messages as JSON text: the template is the server's own. A plain string becomes a user's turn."""
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        return json.dumps(messages, ensure_ascii=False)

    def encode(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Refused: a server does not say its tokens."""
        raise self._lacks("tokens")

    @property
    def tokenizer(self) -> NoReturn:
        """Refused, as `encode`."""
        raise self._lacks("tokenizer")

    @property
    def model(self) -> NoReturn:
        """Refused: the weights are the server's."""
        raise self._lacks("weights")

    def _lacks(self, what: str) -> ServerError:
        return ServerError(
            f"{self.name!r} is served by {self.url}, which does not give its {what}. What counts or scores tokens, or "
            "writes in the user's turn (oracle, reviewed, magpie, self_instruct, evolve, student_paced, edits, scores) "
            "needs load_model(...). Sampling alone (rejection, star, critique, programs, from_corpus) works here."
        )

    def generate(
        self,
        prompts: Sequence[str | list[dict[str, str]]],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        stop: Sequence[str] = (),
        batch_size: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Generation]:
        """One answer a prompt, in order; `batch_size` caps the requests in flight below the `workers` of `connect`.

        Raises `ServerError` when the server refuses a request or keeps failing, and when the cost limit is reached;
        what was answered before is in the cache, if there is one.
        """
        if isinstance(prompts, str):
            raise ServerError("prompts is one string. Give a list of prompts: [prompt].")
        seeds = [seed + number for number in range(len(prompts))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise ServerError(f"{len(seeds)} seeds for {len(prompts)} prompts. Give one number, or one a prompt.")
        shared = {"model": self.name, "max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        bodies = [
            shared | {"messages": _messages(prompt), "seed": number} | ({"stop": list(stop)} if stop else {})
            for prompt, number in zip(prompts, seeds, strict=True)
        ]
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        done: list[Generation] = []
        with (
            httpx.Client(base_url=self.url, headers=headers, timeout=self.timeout) as client,
            ThreadPoolExecutor(min(self.workers, batch_size or self.workers)) as pool,
        ):
            futures = [pool.submit(self._answer, client, body) for body in bodies]
            try:
                for future in futures:
                    done.append(future.result())
                    if progress is not None:
                        progress(len(done), len(prompts))
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return done

    def _answer(self, client: httpx.Client, body: dict[str, Any]) -> Generation:
        file = self.cache / f"{content_key(url=self.url, body=body)}.json" if self.cache else None
        if file is not None and file.exists():
            return _generation(json.loads(file.read_text(encoding="utf-8")), 0.0)
        most = self._reserved(body)
        begin = time.perf_counter()
        try:
            answer = self._asked(client, body)
            found = _generation(answer, time.perf_counter() - begin)
            with self._lock:
                self.spent.requests += 1
                self.spent.tokens_in += found.tokens_in
                self.spent.tokens_out += found.tokens_out
                self.spent.dollars += self._price(found.tokens_in, found.tokens_out)
        finally:
            with self._lock:
                self._held[0] -= most
        if file is not None:
            write_atomic(file, json.dumps(answer, ensure_ascii=False))
        return found

    def _price(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.dollars_a_million[0] + tokens_out * self.dollars_a_million[1]) / 1e6

    def _reserved(self, body: dict[str, Any]) -> float:
        """What a request can cost at most, set aside; refused where that and all that is set aside pass the limit."""
        # a token is a byte at least, and a template adds a few to each message
        read = sum(len(message["content"].encode()) + 16 for message in body["messages"])
        most = self._price(read, body["max_tokens"])
        with self._lock:
            if self.max_dollars is not None and self.spent.dollars + self._held[0] + most > self.max_dollars:
                raise ServerError(
                    f"The limit of {self.max_dollars:.4g} dollars is reached: {self.spent.dollars:.4g} are spent on "
                    f"{self.spent.requests} answers, those under way may take {self._held[0]:.2g} and the next one "
                    f"{most:.2g}. Raise max_dollars and start again: what was saved is not asked again."
                )
            self._held[0] += most
        return most

    def _asked(self, client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
        """The server's JSON answer, after as many tries as allowed."""
        trouble = ""
        for number in range(self.tries):
            self._wait_for_turn()
            pause = None
            try:
                response = client.post("chat/completions", json=body)
                if response.status_code == 200:
                    answer = response.json()
                    _generation(answer, 0.0)  # an answer without choices or counts is tried again as well
                    return answer
                trouble = f"status {response.status_code}: {response.text[:300]}"
                if response.status_code not in AGAIN:
                    raise ServerError(
                        f"{self.url} refused a request with {trouble} Check model name, key and settings."
                    )
                pause = _seconds(response.headers.get("retry-after"))
            except httpx.TransportError as error:
                trouble = f"{type(error).__name__}: {error}"
            except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
                trouble = f"an answer that is not of the protocol ({type(error).__name__}: {error})"
            with self._lock:
                self.spent.retries += 1
            if number + 1 < self.tries:
                # doubling pauses, spread so that workers that failed together do not come back together
                time.sleep(pause if pause is not None else min(30.0, 0.5 * 2**number) * (0.5 + Random().random()))
        raise ServerError(
            f"{self.url} failed {self.tries} times in a row, the last time with {trouble}. What was answered before is "
            "saved. Look at the server's log, then start again."
        )

    def _wait_for_turn(self) -> None:
        if self.requests_per_minute is None:
            return
        with self._lock:
            now = time.monotonic()
            mine = max(now, self._next[0])
            self._next[0] = mine + 60.0 / self.requests_per_minute
        time.sleep(max(0.0, mine - now))


def connect(
    url: str,
    model: str,
    *,
    key_variable: str | None = None,
    workers: int = 8,
    tries: int = 6,
    timeout: float = 120.0,
    requests_per_minute: float | None = None,
    max_dollars: float | None = None,
    dollars_a_million: tuple[float, float] = (0.0, 0.0),
    cache: str | Path | None = None,
) -> Served:
    """The model called `model` on the server at `url` ("http://127.0.0.1:8000/v1"), once it answers.

    Args:
        key_variable: environment variable that holds the API key; the key itself is written nowhere.
        workers: requests in flight at most; each is sent up to `tries` times, `timeout` seconds a try.
        requests_per_minute: rate limit over all workers.
        max_dollars: cost limit, with `dollars_a_million` tokens read and written.
        cache: folder that keeps every answer by its request; a request that is in it is not sent.

    Raises `ServerError` when nothing answers there, the model is not served, or a setting contradicts another.
    """
    key = os.environ.get(key_variable) if key_variable else None
    if key_variable and not key:
        raise ServerError(
            f"The environment variable {key_variable} is not set. Set it to the key: export {key_variable}=..."
        )
    if max_dollars is not None and not any(dollars_a_million):
        raise ServerError(f"max_dollars={max_dollars} with dollars_a_million=(0, 0) limits nothing. Give the prices.")
    for name, value in {"workers": workers, "tries": tries, "timeout": timeout}.items():
        if value <= 0:
            raise ServerError(f"{name}={value} is too small: give a number above 0.")
    url = url.rstrip("/") + "/"
    try:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        answer = httpx.get(f"{url}models", headers=headers, timeout=min(timeout, 10.0))
        served = {entry["id"]: entry for entry in answer.raise_for_status().json()["data"]}
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise ServerError(
            f"No OpenAI-protocol server answers at {url}models ({type(error).__name__}: {str(error)[:200]}). Start "
            f"one, for example: vllm serve {model}, or llama-server -m FILE.gguf; the url ends in /v1."
        ) from None
    if model not in served:
        raise ServerError(f"{url} does not serve {model!r}. It serves: {', '.join(served) or 'nothing'}.")
    folder = Path(cache) if cache is not None else None
    return Served(
        url, model, f"served/{model}", key, workers, tries, timeout, requests_per_minute, max_dollars,
        dollars_a_million, folder,
    )  # fmt: skip


def _messages(prompt: str | list[dict[str, str]]) -> list[dict[str, str]]:
    if isinstance(prompt, list):
        return prompt
    try:
        found = json.loads(prompt)
    except json.JSONDecodeError:
        found = None
    whole = isinstance(found, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in found)
    return found if whole and found else [{"role": "user", "content": prompt}]


def _generation(answer: dict[str, Any], seconds: float) -> Generation:
    choice, usage = answer["choices"][0], answer["usage"]
    text, finished = choice["message"]["content"] or "", choice["finish_reason"] == "stop"
    return Generation(text, [], int(usage["prompt_tokens"]), int(usage["completion_tokens"]), seconds, finished, 0)


def _seconds(retry_after: str | None) -> float | None:
    """Seconds of a Retry-After header; the form with a date is left to the usual pause."""
    return float(retry_after) if retry_after and retry_after.replace(".", "", 1).isdigit() else None
