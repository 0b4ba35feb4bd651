"""On-policy completions over HTTP: several running vLLM servers share the prompts, and one may die."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from draft_training.completions import CompletionLog, CompletionWriter, Requests, sampling_of
from specdec.config import TracesConfig
from specdec.targets import Target

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

REQUEST_TIMEOUT_SEC = 3600.0  # of one answer, which may be 32k tokens on a busy server
MAX_FAILURES = 3  # in a row, then an endpoint is given up
PAUSE_SEC = 1.0  # after a failure


@dataclass(slots=True)
class _Endpoint:
    url: str
    model: str = ""
    failures: int = 0

    @property
    def is_alive(self) -> bool:
        return self.failures < MAX_FAILURES


def generate_over_http(target: Target, traces: TracesConfig, requests: Requests, log: CompletionLog) -> None:
    """Answer ``requests`` on ``traces.endpoints``; every finished one is in ``log`` at once.

    Prompts go as token ids to ``/v1/completions``, and the answer's ids come back (vLLM's ``return_token_ids``): no
    text is tokenised twice. A prompt whose endpoint fails goes to another one.

    Raises:
        ValueError: no endpoint answers or is left, or one refuses a request or returns no token ids.
    """
    asyncio.run(_generate(target, traces, requests, log))


async def _generate(target: Target, traces: TracesConfig, requests: Requests, log: CompletionLog) -> None:
    import httpx

    endpoints = [_Endpoint(url.rstrip("/").removesuffix("/v1")) for url in traces.endpoints]
    limits = httpx.Limits(max_connections=None)
    timeout = httpx.Timeout(REQUEST_TIMEOUT_SEC, connect=30)
    async with httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False) as client:
        await asyncio.gather(*(_greet(client, endpoint, requests) for endpoint in endpoints))
        if not any(endpoint.is_alive for endpoint in endpoints):
            raise ValueError(f"no endpoint answers: {', '.join(traces.endpoints)}; start vLLM servers there")
        with log.writing(len(requests)) as writer:
            job = _Job(client, target, traces, requests, writer)
            await job.run([endpoint for endpoint in endpoints if endpoint.is_alive])
    if job.num_left:
        raise ValueError(
            f"every endpoint is gone with {job.num_left} prompts left; what is answered is kept: "
            "start servers and run the same command again"
        )


async def _greet(client: httpx.AsyncClient, endpoint: _Endpoint, requests: Requests) -> None:
    """Learn the model's name; warn where the server would write a prompt in other ids than the target's."""
    import httpx

    try:
        response = await client.get(f"{endpoint.url}/v1/models", timeout=30)
        response.raise_for_status()
        endpoint.model = str(response.json()["data"][0]["id"])
        prompt, ids = next(iter(requests.items()))
        body = {"model": endpoint.model, "messages": [{"role": "user", "content": prompt}]}
        shown = await client.post(f"{endpoint.url}/tokenize", json=body, timeout=30)
        if shown.status_code == 200 and shown.json().get("tokens") != ids:
            logger.warning("%s writes a prompt in other ids: is %s the target?", endpoint.url, endpoint.model)
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        logger.warning("%s does not answer (%s); going on without it", endpoint.url, error or type(error).__name__)
        endpoint.failures = MAX_FAILURES


class _Job:
    """The prompts still to be answered, and the workers that take them."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        target: Target,
        traces: TracesConfig,
        requests: Requests,
        writer: CompletionWriter,
    ) -> None:
        self._client, self._writer, self._requests = client, writer, requests
        self._workers_per_endpoint = traces.max_num_seqs
        self._context = target.max_position_embeddings
        self._max_new_tokens = traces.max_new_tokens
        self._temperature, self._top_p = sampling_of(target, traces)
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        for prompt in requests:
            self._queue.put_nowait(prompt)
        self.num_left = len(requests)
        self._finished = asyncio.Event()

    async def run(self, endpoints: list[_Endpoint]) -> None:
        """Until every prompt is answered or every endpoint is gone.

        Raises:
            ValueError: an endpoint refuses a request, which another try would not change.
        """
        num_workers = min(self._workers_per_endpoint, len(self._requests))
        workers = [asyncio.create_task(self._work(endpoint)) for endpoint in endpoints for _ in range(num_workers)]
        finished = asyncio.create_task(self._finished.wait())
        pending = {*workers, finished}
        try:
            while not finished.done() and pending != {finished}:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()  # a refusal ends everything
        finally:
            for task in (*workers, finished):
                task.cancel()
            await asyncio.gather(*workers, finished, return_exceptions=True)

    async def _work(self, endpoint: _Endpoint) -> None:
        import httpx

        while endpoint.is_alive:
            prompt = await self._queue.get()
            try:
                completion_ids, reason = await self._answer(endpoint, prompt)
            except (httpx.HTTPError, OSError) as error:
                self._queue.put_nowait(prompt)
                endpoint.failures += 1
                if endpoint.failures == MAX_FAILURES:
                    logger.warning("%s is given up (%s); its prompts go to the others", endpoint.url, error)
                await asyncio.sleep(PAUSE_SEC)
                continue
            endpoint.failures = 0 if endpoint.is_alive else endpoint.failures
            self._writer.add(prompt, self._requests[prompt], completion_ids, reason)
            self.num_left -= 1
            if not self.num_left:
                self._finished.set()

    async def _answer(self, endpoint: _Endpoint, prompt: str) -> tuple[list[int], str | None]:
        ids = self._requests[prompt]
        response = await self._client.post(
            f"{endpoint.url}/v1/completions",
            json={  # no seed: a seeded request whose prompt is prefilled in chunks kills vLLM 0.32's CPU engine
                "model": endpoint.model,
                "prompt": ids,
                "max_tokens": min(self._max_new_tokens, self._context - len(ids)),
                "temperature": self._temperature,
                "top_p": self._top_p,
                "return_token_ids": True,
            },
        )
        if 400 <= response.status_code < 500 and response.status_code not in (408, 429):
            raise ValueError(f"{endpoint.url} refuses a prompt ({response.status_code}): {response.text[:300]}")
        response.raise_for_status()
        choice: dict[str, Any] = response.json()["choices"][0]
        if choice.get("token_ids") is None:
            raise ValueError(f"{endpoint.url} returns no token ids; it must be vLLM 0.32 or a server that knows them")
        return list(choice["token_ids"]), choice.get("finish_reason")
