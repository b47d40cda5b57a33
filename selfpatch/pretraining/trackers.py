"""Send a run's values to TensorBoard, Weights & Biases and trackio, each imported only where it is used."""
import importlib
import re
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from selfpatch.errors import ConfigError, require_packages, try_print

TRACKERS = ("tensorboard", "wandb", "trackio")


def chosen_trackers(log_with: list[str], tensorboard: bool) -> list[str]:
    """Those of --log_with, and what its short form --tensorboard adds; each once."""
    return list(dict.fromkeys([*log_with, *["tensorboard"] * tensorboard]))


def check_trackers(names: list[str], output: Path) -> None:
    """Raise ConfigError if a tracker's package is missing, or a file is where TensorBoard's folder should be."""
    curves = output / "tensorboard"
    if "tensorboard" in names and (curves.exists() or curves.is_symlink()) and not curves.is_dir():
        raise ConfigError(f"{curves} is not a folder, so --log_with tensorboard cannot use it: remove it, or choose "
                          "another --output_dir")
    for name in names:
        require_packages(f"--log_with {name}", name)


class Trackers:
    """The trackers of a run; without any, logging does nothing.

    A tracker that fails during training is given up with a warning; the run goes on.

    Args:
        names: some of TRACKERS.
        output: the run's folder. It names the run, and its tracker_id.txt lets a resumed run continue its curves.
        options: shown by wandb and trackio.
        epoch, step: done so far; TensorBoard drops its values of later ones.

    Raises:
        ConfigError: one of them cannot be started, e.g. without a login.
    """

    def __init__(self, names: Sequence[str] = (), output: Path = Path("."), options: dict | None = None, epoch: int = 0,
                 step: int = 0):
        self.boards, self.services = {}, {}
        for name in names:
            try:
                if name == "tensorboard":
                    from torch.utils.tensorboard import SummaryWriter
                    # steps have their own writer: purging by epoch would drop them
                    self.boards = {"epochs": SummaryWriter(output / "tensorboard", purge_step=epoch),
                                   "steps": SummaryWriter(output / "tensorboard" / "steps", purge_step=step + 1)}
                else:
                    self.services[name] = start_service(name, output, options or {}, resumed=step > 0)
            except Exception as error:  # of whatever kind the package has
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ConfigError(f"--log_with {name} cannot be started: {first}") from None

    def log_epoch(self, row: dict[str, float], step: int) -> None:
        """Send a row of log.txt; its epoch ended after so many steps of the whole run."""
        values = {name.replace("_", "/", 1): value for name, value in row.items() if name != "epoch"}
        self.log("epochs", values, row["epoch"], step)

    def log_step(self, row: dict[str, float | None]) -> None:
        """Send a row of steps.jsonl."""
        values = {f"step/{name}": value for name, value in row.items() if name != "step" and value is not None}
        self.log("steps", values, row["step"], row["step"])

    def log(self, kind: str, values: dict[str, float], board_step: int, step: int) -> None:
        if self.boards:
            self.attempt("tensorboard", lambda: write_scalars(self.boards[kind], values, board_step))
        for name, module in list(self.services.items()):
            if name == "wandb":  # it would drop a resumed run's rows of steps it has already seen
                self.attempt(name, lambda module=module: module.log(values | {"trained_steps": step}))
            else:
                self.attempt(name, lambda module=module: module.log(values, step=step))

    def attempt(self, name: str, action: Callable[[], None]) -> None:
        """Call action; if it fails, give up the tracker of that name."""
        try:
            action()
        except Exception as error:  # of whatever kind the package or its server has
            try_print(f"warning: {name} failed ({error}), and is not used from here on; log.txt and steps.jsonl have "
                      "the same values")
            if name == "tensorboard":
                self.boards = {}
            self.services.pop(name, None)

    def close(self) -> None:
        for board in self.boards.values():
            self.attempt("tensorboard", board.close)
        for name, module in list(self.services.items()):
            self.attempt(name, module.finish)


def write_scalars(board, values: dict[str, float], step: int) -> None:
    for name, value in values.items():
        board.add_scalar(name, value, step)
    board.flush()


def start_service(name: str, output: Path, options: dict, resumed: bool):
    """Begin or continue a run of wandb or trackio, which have the same interface; returns the module."""
    module, path = importlib.import_module(name), output / "tracker_id.txt"
    if not (resumed and path.is_file()):
        path.write_text(uuid.uuid4().hex[:8] + "\n")
    run_id = path.read_bytes().strip().decode(errors="replace")
    if not re.fullmatch(r"[0-9a-zA-Z_-]{1,64}", run_id):
        raise ConfigError(f"{path} holds no name of a run: remove it, and the run gets new curves")
    # trackio knows runs by name alone
    own = {"id": run_id, "dir": str(output)} if name == "wandb" else {}
    module.init(project="selfpatch", name=f"{output.resolve().name}-{run_id}", config=options, resume="allow", **own)
    if name == "wandb":
        module.define_metric("*", step_metric="trained_steps")
    return module
