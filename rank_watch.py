"""A line that says which process the others are waiting for, and why a process has ended.

A rank that waits in an exchange with the others is blocked in native code, so a thread of each tells that it is alive,
through the store by which the processes found each other. Rank 0 watches all others, and the last rank watches rank 0.
"""
import contextlib
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta

import torch.distributed as dist

from distributed import connect_store, format_duration
from errors import TrainingError, printable, program_name


class PeerError(TrainingError):
    """Another rank has ended with an error; the message has it."""

    every_rank, on_all_ranks = False, True  # one line from each machine is enough


class RankWatch(threading.Thread):
    """While entered, says when another rank has given no sign of life, and when it does again.

    An error that ends this rank alone is told to the others. They raise it as PeerError in place of their lost contact;
    one that does not notice that, blocked in NCCL for instance, is ended. In a single process nothing happens.

    Args:
        timeout: after which the exchange itself fails, for the message.
        dist_url: how the ranks found each other; only env:// has a store to tell it through.
        notice_after: seconds without a sign.

    Raises:
        PeerError: on leaving, where contact was lost with a rank that has told its error.
    """

    def __init__(self, rank: int, world_size: int, timeout: timedelta, dist_url: str = "env://",
                 notice_after: float = 60):
        super().__init__(daemon=True)
        self.rank, self.timeout, self.notice_after = rank, timeout, notice_after
        self.watched = range(1, world_size) if rank == 0 else range(1) if rank == world_size - 1 else ()
        self.enabled = world_size > 1 and dist_url == "env://"
        self.ended, self.signs, self.silent = threading.Event(), {}, set()
        self.last_look, self.failure_since = time.monotonic(), None

    def __enter__(self) -> "RankWatch":
        if self.enabled:
            self.start()
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        self.ended.set()
        if not self.enabled or not isinstance(error, Exception) or getattr(error, "on_all_ranks", False):
            return
        told = b""
        with contextlib.suppress(RuntimeError, OSError):  # the store has ended with rank 0's process or with torchrun
            store = connect_store(timedelta(seconds=20))  # the thread's own may be waiting for an answer
            if not is_lost_contact(error):
                store.compare_set("failed", "", f"rank {self.rank} ({name_process()}) has ended: {printable(error)}")
            elif store.check(["failed"]):
                told = store.get("failed")
        if told:
            raise PeerError(told.decode()) from None

    def run(self) -> None:
        """Give signs and look for those of others, six times in notice_after seconds."""
        try:
            store = connect_store(timedelta(seconds=self.notice_after))
            while store and not self.ended.is_set():
                with self.expect_answer():
                    store.set(f"alive/{self.rank}", f"{time.monotonic()} {name_process()}")
                    self.look(store)
                    self.look_for_failure(store)
                self.ended.wait(self.notice_after / 6)
        except (RuntimeError, OSError):  # the store has ended
            if not self.ended.is_set() and 0 in self.watched:
                self.print("the process that the others found each other through has ended")

    @contextlib.contextmanager
    def expect_answer(self) -> Iterator[None]:
        """Say if the store does not answer: a process that is stopped keeps its connections, and has no time limit."""
        host = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
        host, late = f"{host} on {os.environ.get('MASTER_ADDR')}", threading.Event()

        def notice() -> None:
            late.set()
            self.print(f"{host} has not answered for {self.notice_after:g} s; the other ranks wait for it, "
                       f"{format_duration(self.timeout)} at most (--dist_timeout)")

        timer = threading.Timer(self.notice_after, notice)
        timer.daemon = True
        if 0 in self.watched:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()
        if late.is_set():
            self.print(f"{host} is back")

    def look(self, store: dist.Store) -> None:
        """Compare the signs of the watched ranks with those that were there before."""
        now = time.monotonic()
        if now - self.last_look > self.notice_after:  # this process was stopped itself, or the store was
            self.signs = {rank: (sign, now) for rank, (sign, _) in self.signs.items()}
        self.last_look = now
        for rank in self.watched:
            key = f"alive/{rank}"
            sign = store.get(key).decode() if store.check([key]) else "no sign yet"
            if self.signs.get(rank, ("", 0))[0] != sign:
                self.signs[rank] = sign, now
                if rank in self.silent:
                    self.silent.remove(rank)
                    self.print(f"rank {rank} is back")
            elif now - self.signs[rank][1] >= self.notice_after and rank not in self.silent:
                self.silent.add(rank)
                since = datetime.now() - timedelta(seconds=now - self.signs[rank][1])
                self.print(f"rank {rank} ({sign.partition(' ')[2]}) has given no sign of life since {since:%H:%M:%S}; "
                           f"the other ranks wait for it, {format_duration(self.timeout)} at most (--dist_timeout)")

    def look_for_failure(self, store: dist.Store) -> None:
        """End the process if another rank has told its error notice_after seconds ago, and this one is still here."""
        if self.failure_since is None:
            self.failure_since = time.monotonic() if store.check(["failed"]) else None
        elif time.monotonic() - self.failure_since >= self.notice_after and not self.ended.is_set():
            self.print(f"error: {store.get('failed').decode()}")
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(TrainingError.status)

    def print(self, text: str) -> None:
        print(f"{program_name()}: {text}", file=sys.stderr, flush=True)


def name_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def is_lost_contact(error: Exception) -> bool:
    """Whether an exchange with other processes failed because one of them has ended or does not answer."""
    return isinstance(error, dist.DistNetworkError) or isinstance(error, RuntimeError | OSError) and any(
        words in str(error) for words in (
            "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe [",
            "remote process", "Application timeout caused pair closure"))
