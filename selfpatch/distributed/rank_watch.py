"""Report which process the others wait for, and why a process has ended.

A rank that waits in a collective is blocked in native code, so a thread in each rank reports that it is alive, through
the store by which the processes found each other. Rank 0 watches all others, and the last rank watches rank 0.
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
from functools import partial

import torch.distributed as dist

from selfpatch.distributed.processes import connect_store, format_duration, is_lost_contact
from selfpatch.errors import TrainingError, is_first_of_machine, printable, program_name, try_print


class PeerError(TrainingError):
    """Another rank has ended with the error in the message."""

    every_rank, on_all_ranks = False, True  # one line from each machine is enough


class RankWatch(threading.Thread):
    """While entered, report when another rank gives no sign of life, and when it is back.

    An error that ends this rank alone is sent to the others, which raise it as PeerError instead of their lost contact.
    A rank that does not notice, e.g. one blocked in NCCL, is ended. No effect in a single process.

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
        self.rank, self.world_size, self.timeout, self.notice_after = rank, world_size, timeout, notice_after
        self.watched = range(1, world_size) if rank == 0 else range(1) if rank == world_size - 1 else ()
        self.enabled = world_size > 1 and dist_url == "env://"
        self.ended, self.signs, self.silent = threading.Event(), {}, set()
        self.last_look, self.failure = time.monotonic(), ""

    def __enter__(self) -> "RankWatch":
        if self.enabled:
            self.start()
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        self.ended.set()
        if not self.enabled or not isinstance(error, Exception) or getattr(error, "on_all_ranks", False):
            return
        # in a thread, since the store of a process that is stopped never answers
        work = self.ask_for_failure if is_lost_contact(error) else partial(self.tell_failure, error)
        conversation = threading.Thread(target=work, daemon=True)
        conversation.start()
        conversation.join(self.notice_after / 2)
        if is_lost_contact(error) and self.failure:
            raise PeerError(self.failure) from None

    def tell_failure(self, error: Exception) -> None:
        """Send the other ranks the error that ends this one; the rank with the store stays until they know."""
        with contextlib.suppress(RuntimeError, OSError):  # the store has ended
            store = connect_store(timedelta(seconds=self.notice_after))
            store.compare_set("failed", "", f"rank {self.rank} ({name_process()}) has ended: {printable(error)}")
            store.set(f"knows/{self.rank}", "")  # it may not be the only one to fail
            everyone = [f"knows/{rank}" for rank in range(self.world_size)]
            while self.rank == 0 and not store_is_torchruns() and not store.check(everyone):
                time.sleep(0.1)

    def ask_for_failure(self, store: dist.Store | None = None) -> None:
        """Read the error that ended another rank, if there is one."""
        with contextlib.suppress(RuntimeError, OSError):
            store = store or connect_store(timedelta(seconds=self.notice_after))
            if store.check(["failed"]):
                self.failure = store.get("failed").decode()
                store.set(f"knows/{self.rank}", "")

    def run(self) -> None:
        """Give signs and look for those of others, six times in notice_after seconds."""
        try:
            store = connect_store(timedelta(seconds=self.notice_after))
            while store and not self.ended.is_set():
                with self.expect_answer():
                    store.set(f"alive/{self.rank}", f"{time.monotonic()} {name_process()}")
                    self.look(store)
                    self.ask_for_failure(store)
                if self.failure:
                    break
                self.ended.wait(self.notice_after / 6)
        except (RuntimeError, OSError):  # the store has ended
            if not self.ended.is_set() and 0 in self.watched:
                self.report(f"the store by which the ranks found each other has ended ({store_host()})")
        if self.failure and not self.ended.wait(self.notice_after):
            self.end_process()

    @contextlib.contextmanager
    def expect_answer(self) -> Iterator[None]:
        """Report if the store does not answer: a stopped process keeps its connections, and has no time limit."""
        host, late = store_host(), threading.Event()

        def notice() -> None:
            late.set()
            self.report(f"{host} has not answered for {self.notice_after:g} s; the other ranks wait for it, "
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
            self.report(f"{host} is back")

    def look(self, store: dist.Store) -> None:
        """Compare the signs of the watched ranks with those that were there before."""
        now = time.monotonic()
        if now - self.last_look > self.notice_after:  # this process was stopped itself, or the store was
            self.signs = {rank: (sign, now) for rank, (sign, _) in self.signs.items()}
        self.last_look = now
        for rank in self.watched:
            key = f"alive/{rank}"
            sign = store.get(key).decode() if store.check([key]) else "0 which has not begun"
            if self.signs.get(rank, ("", 0))[0] != sign:
                self.signs[rank] = sign, now
                if rank in self.silent:
                    self.silent.remove(rank)
                    self.report(f"rank {rank} is back")
            elif now - self.signs[rank][1] >= self.notice_after and rank not in self.silent:
                self.silent.add(rank)
                since = datetime.now() - timedelta(seconds=now - self.signs[rank][1])
                self.report(f"rank {rank} ({sign.partition(' ')[2]}) has given no sign of life since {since:%H:%M:%S}; "
                           f"the other ranks wait for it, {format_duration(self.timeout)} at most (--dist_timeout)")

    def end_process(self) -> None:
        """End a process that does not notice that another rank has ended with an error."""
        if is_first_of_machine():
            self.report(f"error: {self.failure}")
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(TrainingError.status)

    def report(self, text: str) -> None:
        try_print(f"{program_name()}: {text}", sys.stderr)


def store_is_torchruns() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_host() -> str:
    """The process that has the store, in words."""
    return f"{'torchrun' if store_is_torchruns() else 'rank 0'} on {os.environ.get('MASTER_ADDR')}"


def name_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
