"""A line that says which process the others are waiting for.

A rank that waits in an exchange with the others is blocked in native code, so a thread of each tells that it is alive,
through the store by which the processes found each other, and looks after one other rank or, on rank 0, all of them.
"""
import os
import socket
import sys
import threading
import time
from datetime import datetime, timedelta

import torch.distributed as dist

from distributed import connect_store, format_duration
from errors import program_name


class RankWatch(threading.Thread):
    """While entered, says when another rank has given no sign of life, and when it does again.

    Rank 0 watches all others, and rank 1 watches rank 0. In a single process it does nothing.

    Args:
        timeout: after which the exchange itself fails, for the message.
        dist_url: how the ranks found each other; only env:// has a store to tell it through.
        notice_after: seconds without a sign.
    """

    def __init__(self, rank: int, world_size: int, timeout: timedelta, dist_url: str = "env://",
                 notice_after: float = 60):
        super().__init__(daemon=True)
        self.rank, self.timeout, self.notice_after = rank, timeout, notice_after
        self.watched = {0: range(1, world_size), 1: range(1)}.get(rank, range(0)) if world_size > 1 else ()
        self.enabled = world_size > 1 and dist_url == "env://"
        self.ended, self.signs, self.silent = threading.Event(), {}, set()

    def __enter__(self) -> "RankWatch":
        if self.enabled:
            self.start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()

    def run(self) -> None:
        try:
            store = connect_store(timedelta(seconds=self.notice_after))
            while store and not self.ended.is_set():
                self.give_sign(store)
                self.look(store)
                self.ended.wait(self.notice_after / 6)
        except (RuntimeError, OSError):  # the store has ended with rank 0's process or with torchrun
            if not self.ended.is_set() and 0 in self.watched:
                self.say("the process that the others found each other through is gone or stopped")

    def give_sign(self, store: dist.Store) -> None:
        store.set(f"alive/{self.rank}", f"{time.monotonic()} process {os.getpid()} on {socket.gethostname()}")

    def look(self, store: dist.Store) -> None:
        """Compare the signs of the watched ranks with those that were there before."""
        now = time.monotonic()
        for rank in self.watched:
            key = f"alive/{rank}"
            sign = store.get(key).decode() if store.check([key]) else "no sign yet"
            if self.signs.get(rank, ("", 0))[0] != sign:
                self.signs[rank] = sign, now
                if rank in self.silent:
                    self.silent.remove(rank)
                    self.say(f"rank {rank} is back")
            elif now - self.signs[rank][1] >= self.notice_after and rank not in self.silent:
                self.silent.add(rank)
                since = datetime.now() - timedelta(seconds=now - self.signs[rank][1])
                self.say(f"rank {rank} ({sign.partition(' ')[2]}) has given no sign of life since {since:%H:%M:%S}; "
                         f"the other ranks wait for it, {format_duration(self.timeout)} at most (--dist_timeout)")

    def say(self, what: str) -> None:
        print(f"{program_name()}: {what}", file=sys.stderr, flush=True)
