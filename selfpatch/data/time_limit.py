"""A limit of time for what blocks, such as a read from a worker that is stopped or from a file server that is away."""
import contextlib
import signal
import threading
from collections.abc import Iterator


class TimeLimit(BaseException):
    """The time is over. Not an Exception, which a reader of images could take for an unreadable file."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimit if what is done within takes longer; 0, or another thread than the main one, for no limit.

    By an alarm, since what a stopped worker blocks is a read from a socket.
    """
    def end(*_) -> None:
        raise TimeLimit

    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
