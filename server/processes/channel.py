"""Messages between the supervisor and a process: calls, which are answered, and notes, which are not."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping
from inspect import signature
from itertools import chain, count, repeat
from typing import Any

import orjson

from de3.runtime.background import report, run_once
from de3.runtime.errors import RequestError
from de3.server.processes.messages import decode, encode

HEAD_BYTES = 4  # size of the length that precedes each message
# Calls that are cancelled with their caller, or when the channel closes; others, such as changes, run to their end.
CANCELLED = frozenset({"ask_upstream"})

# Handles a call or a note, given its arguments; may be a coroutine function.
Handler = Callable[..., Any]


class ChannelClosedError(Exception):
    """The other side has closed the channel, for example because its process has ended."""


class Channel:
    """One end of a Unix socket that carries JSON messages.

    The arguments of a handler are of its annotated types; all other values are parsed JSON (see messages.py).

    A RequestError of a handler is raised again in the caller. Any other error is raised in the caller as a RequestError
    with the cause "internal"; the handler's side logs it unless it is a ChannelClosedError. Handlers that are plain
    functions run in the order of the messages. Coroutine functions also start in this order, but a plain function that
    a later message calls may run before them.
    """

    def __init__(self) -> None:
        self._handlers: dict[str, tuple[Handler, list[Any]]] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._answering: dict[int, asyncio.Task[None]] = {}  # tasks of CANCELLED, by number of the call
        self._numbers = count(1)
        self._writer: asyncio.StreamWriter | None = None
        self._unsent: list[bytes] = []  # messages sent before the channel runs
        self.is_closed = False

    async def run(self, sock: socket.socket, handlers: Mapping[str, Handler]) -> None:
        """Receive messages until the other side closes the channel; calls in progress then raise ChannelClosedError."""
        for name, handler in handlers.items():
            kinds = [parameter.annotation for parameter in signature(handler).parameters.values()]
            self._handlers[name] = handler, kinds
        reader, self._writer = await asyncio.open_unix_connection(sock=sock)
        self._writer.writelines(self._unsent)
        self._unsent.clear()
        try:
            while True:
                size = int.from_bytes(await reader.readexactly(HEAD_BYTES))
                self._receive(orjson.loads(await reader.readexactly(size)))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.is_closed = True
            self._writer.close()
            for future in self._calls.values():
                if not future.done():
                    future.set_exception(ChannelClosedError("the process has ended"))
            for task in list(self._answering.values()):
                task.cancel()

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a handler of the other side; returns its result as parsed JSON.

        Raises RequestError if the handler fails, and ChannelClosedError if the channel is closed before the answer.
        """
        if self.is_closed:
            raise ChannelClosedError("the process has ended")
        number, future = next(self._numbers), asyncio.get_running_loop().create_future()
        self._calls[number] = future
        try:
            self._send([number, method, arguments])
            return await future
        except asyncio.CancelledError:
            self._send([number, None, None])
            raise
        finally:
            del self._calls[number]

    def tell(self, method: str, *arguments: Any) -> None:
        """Send a note; it is lost if the channel is closed."""
        self._send([0, method, arguments])

    @property
    def unsent(self) -> int:
        """Bytes in the write buffer, which the socket has not accepted yet; 0 before `run`."""
        return 0 if self._writer is None else self._writer.transport.get_write_buffer_size()

    def _send(self, message: list[Any]) -> None:
        data = encode(message)
        data = len(data).to_bytes(HEAD_BYTES) + data
        if self._writer is None:
            self._unsent.append(data)
        elif not self.is_closed:
            self._writer.write(data)

    def _receive(self, message: list[Any]) -> None:
        number, method, value = message
        if method is None:  # the call was cancelled
            if number in self._answering:
                self._answering[number].cancel()
        elif isinstance(method, str):
            self._run(number, method, value)
        elif (future := self._calls.get(number)) is not None and not future.done():
            if method:  # an error
                future.set_exception(RequestError(**value))
            else:
                future.set_result(value)

    def _run(self, number: int, method: str, arguments: list[Any]) -> None:
        """Run a handler and answer the call, or start a task that does so if the handler is a coroutine function."""
        try:
            handler, kinds = self._handlers[method]
            result = handler(*map(decode, chain(kinds, repeat(Any)), arguments))
            if asyncio.iscoroutine(result):
                task = run_once("message", self._finish(number, result))
                if method in CANCELLED:
                    self._answering[number] = task
                    task.add_done_callback(lambda _: self._answering.pop(number))
            else:
                self._answer(number, result)
        except Exception as error:
            self._fail(number, error)

    async def _finish(self, number: int, running: Awaitable[Any]) -> None:
        try:
            self._answer(number, await running)
        except Exception as error:
            self._fail(number, error)

    def _answer(self, number: int, result: Any) -> None:
        if number:
            self._send([number, False, result])

    def _fail(self, number: int, error: Exception) -> None:
        if not isinstance(error, RequestError | ChannelClosedError):
            report("message", error)
        if number:
            self._send([number, True, _row(error)])


def _row(error: Exception) -> dict[str, Any]:
    if isinstance(error, RequestError):
        return vars(error)
    message = f"{type(error).__name__}: {error}".encode(errors="replace").decode()  # half a surrogate pair
    return {"message": message, "cause": "internal"}
