"""A small HTTP endpoint for a trained learner. Only this file imports starlette and uvicorn.

    GET  /health             {"status": "ok"}
    GET  /                   what is served: method, input, classes and their tasks
    POST /predict?top=5      the body is one image file, or one text in UTF-8
                             {"answers": [{"class", "task", "score", "probability"}, ...],
                              "milliseconds": of this request}

Every error is {"error": "<one sentence>"} with a status of 4xx or 5xx. Only what is no HTTP, or a
flood of connections, is refused by uvicorn in its own words.
"""

import contextlib
import threading
import time
from collections.abc import AsyncIterator, Mapping
from typing import NamedTuple

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from qkd_jax.errors import DataError, QkdError
from qkd_jax.runs import answers
from qkd_jax.runs.load import LoadedRun

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SECONDS_TO_STOP = 5  # for requests that are being answered when the server is told to end


class Limits(NamedTuple):
    """What one client may take.

    Attributes:
      bytes: of a body.
      seconds: from the first byte of a request to its answer.
      requests: that are read or computed at a time; further ones are refused at once.
    """

    bytes: int
    seconds: float
    requests: int


class _Busy(Exception):
    """All places are taken."""


class _Place:
    """A place for one request among those of `free`, given back once.

    Raises:
      _Busy: there is none.
    """

    def __init__(self, free: threading.Semaphore):
        if not free.acquire(blocking=False):
            raise _Busy
        self._free, self._lock, self._held = free, threading.Lock(), True
        self.computes = False  # in a thread, which gives it back

    def give(self) -> None:
        with self._lock:
            if self._held:
                self._free.release()
            self._held = False


def new_app(trained: LoadedRun, limits: Limits, hosts: tuple[str, ...] = LOOPBACK) -> Starlette:
    """The application that `serve` runs.

    Args:
      trained: of `load_learner` or `load_run`.
      limits: of each request.
      hosts: names that a request may call this server by, so that a page of another site cannot
        reach it by a name of its own; none = any.
    """
    texts = answers.reads_texts(trained)
    free, computing = threading.Semaphore(limits.requests), threading.Lock()

    def answer(body: bytes, top: int, place: _Place) -> list[answers.Answer]:
        place.computes = True
        try:
            with computing:  # one device, and the memory of one decoder
                if texts:
                    fields = answers.text_fields(trained, _text(body))
                else:
                    fields = answers.image_fields(trained, body, "body")
                return answers.best_classes(trained, fields, top)
        finally:
            place.give()

    async def predict(request: Request) -> Response:
        top, began = _top(request), time.perf_counter()
        _refuse_long(request, limits.bytes)
        place = _Place(free)
        try:
            with anyio.fail_after(limits.seconds):
                body = await _body(request, limits.bytes)
                # A thread goes on when nobody waits for it any more, and keeps its place so long.
                found = await anyio.to_thread.run_sync(
                    answer, body, top, place, abandon_on_cancel=True
                )
        except TimeoutError:
            raise HTTPException(503, f"expected an answer within {limits.seconds:g} s") from None
        finally:
            if not place.computes:
                place.give()
        milliseconds = 1000 * (time.perf_counter() - began)
        shown = [answer.as_json() for answer in found]
        return JSONResponse({"answers": shown, "milliseconds": milliseconds})

    async def describe(request: Request) -> Response:
        config, tasks = trained.config, trained.state.task_of_class.tolist()
        named = zip(trained.class_names, tasks, strict=True)
        return JSONResponse(
            {
                "method": config.method,
                "backbone": config.backbone.name,
                "input": "text" if texts else "image",
                "classes": [{"class": name, "task": t + 1} for name, t in named if t >= 0],
                "limits": limits._asdict(),
            }
        )

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    def of_host(endpoint):
        """The endpoint for requests that call this server by one of its names."""

        async def checked(request: Request) -> Response:
            if hosts and request.url.hostname not in hosts:
                raise HTTPException(421, f"host: expected {' or '.join(hosts)}, found another name")
            return await endpoint(request)

        return checked

    @contextlib.asynccontextmanager
    async def warm(app: Starlette) -> AsyncIterator[None]:
        # Compiled before the first request, whose time is limited.
        await anyio.to_thread.run_sync(answers.best_classes, trained, answers.blank_fields(trained))
        yield

    return Starlette(
        routes=[
            Route("/", of_host(describe)),
            Route("/health", of_host(health)),
            Route("/predict", of_host(predict), methods=["POST"]),
        ],
        exception_handlers={
            HTTPException: lambda request, error: _told(
                error.status_code, error.detail, error.headers
            ),
            QkdError: lambda request, error: _told(422, str(error)),
            ClientDisconnect: lambda request, error: _told(400, "the body ended too early"),
            _Busy: lambda request, error: _told(
                503, f"expected at most {limits.requests} requests at a time", {"Retry-After": "1"}
            ),
            Exception: lambda request, error: _told(500, "an error inside the server"),
        },
        lifespan=warm,
    )


def serve(app: Starlette, host: str, port: int, limits: Limits) -> int:
    """Answers requests until SIGINT or SIGTERM; what is being answered then may finish.

    Returns:
      The exit code: 1 if it cannot begin, as at a port that is taken, which uvicorn tells.
    """
    try:
        uvicorn.run(
            app,
            host=host,
            port=port,
            log_level="warning",
            server_header=False,
            timeout_keep_alive=SECONDS_TO_STOP,
            timeout_graceful_shutdown=SECONDS_TO_STOP,
            # Also of those that are still sending their headers.
            limit_concurrency=4 * limits.requests + 8,
        )
    except SystemExit:  # with a code of its own
        return 1
    return 0


def _told(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status, headers)


def _top(request: Request) -> int:
    text = request.query_params.get("top", "5")
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= 1000):
        raise HTTPException(
            400, f"top: expected a whole number from 1 to 1000, found {text[:20]!r}"
        )
    return int(text)


def _refuse_long(request: Request, limit: int) -> None:
    """Before anything is read, if the client says how much it will send."""
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        raise _too_long(limit)


async def _body(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise _too_long(limit)
    if not body:
        raise DataError("body: expected one image file or one text, found nothing")
    return bytes(body)


def _too_long(limit: int) -> HTTPException:
    return HTTPException(413, f"body: expected at most {limit:,} bytes, found more")


def _text(body: bytes) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError:
        raise DataError("body: expected a text in UTF-8, found other bytes") from None
