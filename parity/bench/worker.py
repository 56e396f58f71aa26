"""A decoder in a process of its own, timed by the clock inside that process.

Libraries bring OpenMP threads, and where several of them share one process, threads that wait for
work take cores from threads that have some: beside CTranslate2, a step of torch took 28 instead of
23 ms, although the two never ran at the same time.
"""

import contextlib
import dataclasses
import importlib
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from parity.bench.decoders.protocol import Decoder, TimedTokens
from parity.bench.machine import Unavailable
from parity.system.memory import hand_back_freed_memory


class Worker:
    """A process in which decoders are made and run. To be used in a `with`.

    Args:
        library: imported by the process first, so that it does not count as a decoder's memory.

    Attributes:
        pid: of the process.
    """

    def __init__(self, library: str):
        # Not forked: the copy of a process with threads waits for locks that nobody releases.
        context = multiprocessing.get_context("spawn")
        self._library = library
        self._connection, other_end = context.Pipe()
        arguments = other_end, library, torch.get_num_threads()
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        other_end.close()
        self.pid = self._process.pid

    def __enter__(self) -> "Worker":
        self._receive()
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()  # which ends the process, unless it is busy
        self._process.terminate()
        self._process.join()

    def make(self, kind: Callable[..., Decoder], *arguments: object) -> "RemoteDecoder":
        """Make a decoder in the process; its class and arguments are pickled.

        Raises:
            Unavailable: if the class raises it.
            ValueError: with the message of any other exception.
        """
        answer = self.ask("make", kind, *arguments)
        assert isinstance(answer, tuple)
        return RemoteDecoder(self, *answer)

    def clear(self) -> None:
        """Drop all decoders and return their memory to the system."""
        self.ask("clear")

    def ask(self, what: str, *arguments: object) -> object:
        """Return the answer of the process.

        Raises:
            Unavailable: if it was raised there.
            ValueError: for any other exception there, and if the process has ended.
        """
        self.send(what, *arguments)
        return self._receive()

    def send(self, what: str, *arguments: object) -> None:
        """Send a request without waiting for its answer."""
        with contextlib.suppress(BrokenPipeError):  # `_receive` says why
            self._connection.send((what, *arguments))

    def _receive(self) -> object:
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


@dataclasses.dataclass(frozen=True)
class RemoteDecoder:
    """The decoder of a number in a worker; see `Decoder`."""

    _worker: Worker
    _number: int
    name: str
    form: str
    ran: str
    reads_prompt: bool
    extra_weight_bytes: int | None

    def prefill(self) -> None:
        """Read the prompt and wait."""
        self._worker.ask("prefill", self._number)

    def timed_steps(self, num_steps: int) -> TimedTokens:
        """Append tokens to the prompt, timed in the process."""
        found = self._worker.ask("timed_steps", self._number, num_steps)
        assert isinstance(found, TimedTokens)
        return found


def _serve(connection: Connection, library: str, num_threads: int) -> None:
    """Answer requests in the process until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other end is interrupted, and hangs up
    torch.set_num_threads(num_threads)
    importlib.import_module(library)
    connection.send((None, None))
    decoders: list[Decoder] = []
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            what, *arguments = connection.recv()
            try:
                answer = _answer(decoders, what, arguments)
            except Unavailable as error:
                connection.send((None, error))
            except Exception as error:  # of any class, which may not survive pickling
                connection.send((None, ValueError(f"{type(error).__name__}: {error}")))
            else:
                connection.send((answer, None))


def _answer(decoders: list[Decoder], what: str, arguments: list) -> object:
    match what, arguments:
        case "make", [kind, *rest]:
            decoders.append(kind(*rest))
            made = decoders[-1]
            described = made.name, made.form, made.ran, made.reads_prompt, made.extra_weight_bytes
            return len(decoders) - 1, *described
        case "prefill", [number]:
            return decoders[number].prefill()
        case "timed_steps", [number, num_steps]:
            return decoders[number].timed_steps(num_steps)
        case "clear", []:
            decoders.clear()
            return hand_back_freed_memory()
    raise ValueError(what)
