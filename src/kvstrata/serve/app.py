"""The routes of one worker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from kvstrata.errors import MissingExtra
from kvstrata.serve.problems import Problem
from kvstrata.serve.settings import ServeSettings

try:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError as error:
    raise MissingExtra("serve", error.name or "starlette") from error

from kvstrata.serve.engine import Answer, Delta, Job
from kvstrata.serve.schema import ChatRequest, CompletionRequest, read_body
from kvstrata.serve.wire import Shape
from kvstrata.serve.worker import Worker

__all__ = ["create_app"]

_LOG = logging.getLogger("kvstrata.serve")

_MOST_BYTES = 16 << 20
"""Of a body; no context is longer."""

_GONE = 499
"""The status, read by nobody, of a request whose client has gone: it is counted."""

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


def create_app(settings: ServeSettings) -> Any:
    """Return the ASGI application of a worker; it loads its model when it is started."""
    app = _App(settings)

    def route(path: str, handler: Handler, method: str) -> Any:
        return Route(path, app.counted(path, handler), methods=[method])

    return Starlette(
        routes=[
            route("/v1/models", app.models, "GET"),
            route("/v1/models/{name:path}", app.model, "GET"),
            route("/v1/chat/completions", app.chat, "POST"),
            route("/v1/completions", app.completion, "POST"),
            route("/health", app.health, "GET"),
            route("/metrics", app.metrics, "GET"),
        ],
        lifespan=app.lifespan,
        exception_handlers={404: _not_found, 405: _not_found},
    )


class _App:
    """The handlers, and the worker behind them."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._worker: Worker | None = None

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        """Load the model, and give everything back at the end."""
        del app
        worker = self._worker = await asyncio.to_thread(Worker, self._settings)
        try:
            yield
        finally:
            await asyncio.to_thread(worker.close)

    @property
    def worker(self) -> Worker:
        """The worker, once it was started."""
        assert self._worker is not None
        return self._worker

    def counted(self, path: str, handler: Handler) -> Handler:
        """Wrap a handler: problems become answers, and all ends are counted."""

        async def handle(request: Request) -> Response:
            try:
                response = await handler(request)
            except Problem as problem:
                response = _refusal(problem)
            except Exception:  # noqa: BLE001 - whatever it is, the client is told in the API's form, and it is logged
                _LOG.exception("a request failed")
                response = _refusal(Problem.internal())
            self.worker.metrics.requests.labels(path.partition("/{")[0], str(response.status_code)).inc()
            response.headers["x-kvstrata-worker"] = str(os.getpid())
            return response

        return handle

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        del request
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        if request.path_params["name"] != self._settings.served_name:
            raise Problem("there is no such model", status=404, param="model", code="model_not_found")
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._settings.served_name, "object": "model", "created": self.worker.created, "owned_by": "kvstrata",
        }  # fmt: skip

    async def health(self, request: Request) -> Response:
        """GET /health."""
        del request
        if self.worker.engine.stopping:
            raise Problem.stopping()
        return JSONResponse({"status": "ok", "worker": os.getpid(), "pending": self.worker.engine.pending})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        del request
        text = await asyncio.to_thread(self.worker.metrics.text)
        return Response(text, media_type="text/plain; version=1.0.0")

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        asked = read_body(await _body(request), ChatRequest, self._settings.served_name)
        tokens = self.worker.chat_tokens([message.plain() for message in asked.messages])
        return await self._answer(request, asked, tokens, Shape(True, self._settings.served_name))

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        asked = read_body(await _body(request), CompletionRequest, self._settings.served_name)
        tokens = self.worker.prompt_tokens(asked.one_prompt())
        return await self._answer(request, asked, tokens, Shape(False, self._settings.served_name))

    async def _answer(
        self, request: Request, asked: ChatRequest | CompletionRequest, tokens: list[int], shape: Shape
    ) -> Response:
        room = self.worker.room_for(tokens)
        most = asked.most_tokens or (room if shape.chat else min(16, room))
        if most > room:
            raise Problem(
                f"the prompt has {len(tokens)} tokens and {most} more were asked for, but the context has only "
                f"{len(tokens) + room}", param="max_tokens", code="context_length_exceeded",
            )  # fmt: skip
        job = Job(
            tokens=tokens,
            most_tokens=most,
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=asked.top_p or 1.0,
            top_k=asked.top_k,
            seed=asked.seed,
            stops=asked.stops,
            session=asked.prompt_cache_key,
        )
        events = _Accounted(self.worker, job)
        try:
            if not asked.stream:
                whole = await _unless_gone(request, _collected(events, shape))
                return Response(status_code=_GONE) if whole is None else JSONResponse(whole)
            first = await _unless_gone(request, anext(events))  # what can be refused is refused with its status
        except BaseException:
            await events.aclose()
            raise
        if first is None:
            await events.aclose()
            return Response(status_code=_GONE)
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return _Stream(events, _sse(events, first, shape, usage=with_usage))


class _Accounted:
    """The events of a job, counted."""

    def __init__(self, worker: Worker, job: Job) -> None:
        self._worker = worker
        self._events = worker.engine.run(job)

    def __aiter__(self) -> _Accounted:
        return self

    async def __anext__(self) -> Delta | Answer:
        pending, engine = self._worker.metrics.pending, self._worker.engine
        event = await anext(self._events)
        pending.set(engine.pending)
        if isinstance(event, Answer):
            self._worker.metrics.answered(event)
        return event

    async def aclose(self) -> None:
        """Cancel what isn't there yet."""
        await self._events.aclose()  # type: ignore[attr-defined]
        self._worker.metrics.pending.set(self._worker.engine.pending)


class _Stream(StreamingResponse):  # type: ignore[misc]  # starlette is an extra
    """Server-sent events. When the client goes, or all is sent, the job ends."""

    def __init__(self, events: _Accounted, chunks: AsyncIterator[bytes]) -> None:
        super().__init__(chunks, media_type="text/event-stream")
        self._events = events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it all, as ASGI has it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


async def _sse(events: _Accounted, first: Delta | Answer, shape: Shape, *, usage: bool) -> AsyncIterator[bytes]:
    """The answer as server-sent events."""
    try:
        head = shape.first()
        if head is not None:
            yield _data(head)
        event = first
        while not isinstance(event, Answer):
            yield _data(shape.part(event.text))
            event = await anext(events)
        yield _data(shape.last(event))
        if usage:
            yield _data(shape.account(event))
        yield b"data: [DONE]\n\n"
    except Problem as problem:  # the status was sent long ago
        yield _data(problem.body())


async def _collected(events: _Accounted, shape: Shape) -> dict[str, Any]:
    """The answer in one piece."""
    text = ""
    async for event in events:
        if isinstance(event, Answer):
            return shape.whole(text, event)
        text += event.text
    raise Problem.internal()


async def _unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """What the work gives; None, and the work is cancelled, when the client goes before that."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return await tasks[0] if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MOST_BYTES:
            raise Problem(f"the body is larger than {_MOST_BYTES} bytes", status=413)
    return body


def _data(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _refusal(problem: Problem) -> Response:
    return JSONResponse(problem.body(), problem.status, problem.headers())


async def _not_found(request: Request, error: Any) -> Response:
    return _refusal(Problem(f"{request.method} {request.url.path} is not here", status=error.status_code))
