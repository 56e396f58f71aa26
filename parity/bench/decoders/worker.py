"""A decoder in a process of its own, timed by the clock inside that process.

Libraries bring OpenMP threads, and where several of them share one process, threads that wait for
work take cores from threads that have some: beside CTranslate2, a step of torch took 28 instead of
23 ms, although the two never ran at the same time.
"""

import contextlib
import importlib
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from parity.bench.decoders.protocol import Decoder, TimedTokens
from parity.bench.machine import Unavailable
from parity.system.memory import hand_back_freed_memory

_ATTRIBUTES = "name", "form", "ran", "reads_prompt", "extra_weight_bytes"


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
        """Make a decoder in the process; its class and arguments are pickled; raises as `ask`."""
        number, attributes = self.ask(_make, kind, *arguments)
        return RemoteDecoder(self, number, attributes)

    def clear(self) -> None:
        """Drop all decoders and return their memory to the system."""
        self.ask(_clear)

    def ask(self, function: Callable, *arguments: object):
        """Return the result of a function called there, with the decoders and the arguments.

        Raises:
            Unavailable: if the function raises it.
            ValueError: for any other exception there, and if the process has ended.
        """
        self.send(function, *arguments)
        return self._receive()

    def send(self, function: Callable, *arguments: object) -> None:
        """Call a function without waiting for its result."""
        with contextlib.suppress(BrokenPipeError):  # `_receive` says why
            self._connection.send((function, *arguments))

    def _receive(self):
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


class RemoteDecoder:
    """A decoder in a worker, by its number there; see `Decoder`."""

    name: str
    form: str
    ran: str
    reads_prompt: bool
    extra_weight_bytes: int | None

    def __init__(self, worker: Worker, number: int, attributes: dict[str, object]):
        self._worker, self._number = worker, number
        vars(self).update(attributes)

    def prefill(self) -> None:
        """Read the prompt and wait."""
        self._worker.ask(_prefill, self._number)

    def timed_steps(self, num_steps: int) -> TimedTokens:
        """Append tokens to the prompt, timed in the process."""
        return self._worker.ask(_timed_steps, self._number, num_steps)


def _serve(connection: Connection, library: str, num_threads: int) -> None:
    """Answer requests in the process until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other end is interrupted, and hangs up
    torch.set_num_threads(num_threads)
    importlib.import_module(library)
    connection.send((None, None))
    decoders: list[Decoder] = []
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            function, *arguments = connection.recv()
            try:
                answer = function(decoders, *arguments)
            except Unavailable as error:
                connection.send((None, error))
            except Exception as error:  # of any class, which may not survive pickling
                connection.send((None, ValueError(f"{type(error).__name__}: {error}")))
            else:
                connection.send((answer, None))


def _make(decoders: list[Decoder], kind: Callable[..., Decoder], *arguments: object):
    decoders.append(kind(*arguments))
    return len(decoders) - 1, {name: getattr(decoders[-1], name) for name in _ATTRIBUTES}


def _prefill(decoders: list[Decoder], number: int) -> None:
    decoders[number].prefill()


def _timed_steps(decoders: list[Decoder], number: int, num_steps: int) -> TimedTokens:
    return decoders[number].timed_steps(num_steps)


def _clear(decoders: list[Decoder]) -> None:
    decoders.clear()
    hand_back_freed_memory()
