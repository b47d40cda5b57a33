"""A Python whose own programs and processes run under REHEARSE too: REHEARSE tests/rehearsed.py [-m MODULE | SCRIPT] …

REHEARSED_PYTHON names an executable file that starts this, and takes the place of sys.executable.
"""
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import torch

sys.executable = os.environ["REHEARSED_PYTHON"]
multiprocessing.set_executable(sys.executable)
aten = torch.library.Library("aten", "IMPL")
# what is on the device is 0, but not the number of these that is read from it
aten.impl("nonzero", lambda x: x.new_empty(0, x.dim(), dtype=torch.long), "CUDA")
words = sys.argv[1:]
if "-c" in words:  # flags of the interpreter may come before it
    _, code, *rest = words[words.index("-c"):]
    sys.argv = ["-c", *rest]
    exec(code, {"__name__": "__main__"})
elif words[0] == "-m":
    sys.argv = words[1:]
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
else:
    sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
    if Path(words[0]).name == "main_selfpatch.py":
        from selfpatch.pretraining import loop
        loop.check_weights = lambda _: None  # whose answer is 0 here, which means no
    runpy.run_path(words[0], run_name="__main__")
