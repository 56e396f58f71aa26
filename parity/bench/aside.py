"""A contender in a process of its own, timed by the clock inside it.

Libraries bring OpenMP threads, and where several of them live in one process, threads that wait for
work take cores from threads that have some: with CTranslate2 beside it, a step of torch took 28
instead of 23 ms, although the two never ran at the same time.
"""

import contextlib
import importlib
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from parity.bench.contenders import Contender, Turn
from parity.bench.steps import Unavailable
from parity.system.memory import hand_back_freed_memory


class Room:
    """A process in which contenders are made and take their turns. To be used in a `with`.

    Args:
        library: which the process imports first, so that it is not counted as a contender's memory.

    Attributes:
        pid: of the process.
    """

    def __init__(self, library: str):
        # Not forked: a copy of a process that has threads waits for what they will never do.
        context = multiprocessing.get_context("spawn")
        self._library = library
        self._connection, theirs = context.Pipe()
        arguments = theirs, library, torch.get_num_threads()
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.pid = self._process.pid

    def __enter__(self) -> "Room":
        self._receive()
        return self

    def __exit__(self, *_) -> None:
        self._connection.close()  # which ends the process, unless it is busy
        self._process.terminate()
        self._process.join()

    def make(self, kind: Callable[..., Contender], *arguments: Any) -> "Aside":
        """A contender in here; its class and what it is made of are pickled.

        Raises:
            Unavailable: when the class says so.
            ValueError: with whatever else it raises, in words.
        """
        return Aside(self, *self.ask("make", kind, *arguments))

    def clear(self) -> None:
        """Drops all contenders and hands their memory back."""
        self.ask("clear")

    def ask(self, *request: Any) -> Any:
        """What the process answers.

        Raises:
            Unavailable: when it was raised in there.
            ValueError: for whatever else was, and when the process has ended.
        """
        self._send(request)
        return self._receive()

    def _send(self, request: tuple) -> None:
        with contextlib.suppress(BrokenPipeError):  # the answer will be missing, and says why
            self._connection.send(request)

    def _receive(self) -> Any:
        try:
            answer, error = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise ValueError(
                f"bench: the process of {self._library} ended by itself, exit code "
                f"{self._process.exitcode}. It has to answer. Look whether memory was short, or "
                f"leave it out by --without '{self._library}'."
            ) from None
        if error is not None:
            raise error
        return answer


class Aside:
    """A contender in a room."""

    def __init__(self, room: Room, number: int, attributes: dict[str, Any]):
        self._room, self._number = room, number
        self.name: str = attributes["name"]
        self.framework: str = attributes["framework"]
        self.form: str = attributes["form"]
        self.ran: str = attributes["ran"]
        self.reads: bool = attributes["reads"]
        self.extra_bytes: int | None = attributes["extra_bytes"]

    def prefill(self) -> None:
        """Reads the prompt and waits."""
        self._room.ask("prefill", self._number)

    def turn(self, num_steps: int) -> Turn:
        """Writes behind the prompt; the clock is in there."""
        return self._room.ask("turn", self._number, num_steps)


_ATTRIBUTES = "name", "framework", "form", "ran", "reads", "extra_bytes"


def _serve(connection: Connection, library: str, num_threads: int) -> None:
    """What the process does: answers until nobody can ask any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks is interrupted, and hangs up
    torch.set_num_threads(num_threads)
    importlib.import_module(library)
    connection.send((None, None))
    contenders: list[Contender] = []
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            request = connection.recv()
            try:
                answer = _answer(contenders, *request)
            except Unavailable as error:
                connection.send((None, error))
            except Exception as error:  # of any class, which may not survive the way
                connection.send((None, ValueError(f"{type(error).__name__}: {error}")))
            else:
                connection.send((answer, None))


def _answer(contenders: list[Contender], what: str, *arguments: Any) -> Any:
    match what:
        case "make":
            kind, *arguments = arguments
            contender = kind(*arguments)
            contenders.append(contender)
            return len(contenders) - 1, {name: getattr(contender, name) for name in _ATTRIBUTES}
        case "prefill":
            return contenders[arguments[0]].prefill()
        case "turn":
            return contenders[arguments[0]].turn(arguments[1])
        case "clear":
            contenders.clear()
            return hand_back_freed_memory()
    raise ValueError(what)
