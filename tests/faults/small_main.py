"""main_selfpatch.py with a narrow, shallow network, for tests that start it as a process of its own."""
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest  # noqa: E402
import torch  # noqa: E402
from networks import shrink_job  # noqa: E402

import main_selfpatch  # noqa: E402
from selfpatch.distributed.rank_watch import RankWatch  # noqa: E402
from selfpatch.errors import run_main  # noqa: E402

torch.set_num_threads(1)
shrink_job(pytest.MonkeyPatch())
if seconds := os.environ.get("NOTICE_AFTER"):
    RankWatch.__init__.__defaults__ = ("env://", float(seconds))
if seconds := os.environ.get("SLOW_SAVE"):
    def save(*_):
        print("small_main.py: saving", file=sys.stderr, flush=True)
        time.sleep(float(seconds))

    main_selfpatch.RunFolder.try_save = save
for word in os.environ.get("RANK_OPTIONS", "").split(";"):  # such as 1:--lr=0.1;1:--data_path=other
    rank, _, option = word.partition(":")
    if rank and os.environ.get("RANK") == rank:
        sys.argv.append(option)

if __name__ == "__main__":
    run_main(main_selfpatch.main)
