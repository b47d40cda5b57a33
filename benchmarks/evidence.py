"""The paper's claim at a small scale: one recipe without the patch loss (DINO), with it (SelfPatch), and no training.

    python benchmarks/evidence.py --seeds 0 1 2                         # the demo's scenes and network, on a CPU
    python benchmarks/evidence.py --data_path imagenette --davis_path DAVIS --minutes 9     # ViT-S/16, on a GPU

Prints k-NN, J & F, dense retrieval, losses, images and seconds of every seed, and the differences between the methods;
curves.png, overlay.gif and figures.json go to --output_dir. Options that it does not know are main_selfpatch.py's. The
same command again goes on where it was stopped, and repeats nothing that is done. docs/EVIDENCE.md: what was found.
"""
import argparse
import functools
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from demo_seeds import cpu_seconds  # noqa: E402
from evidence_tables import Figures, all_tables, differences  # noqa: E402

import demo  # noqa: E402
from checkpoint_files import write_checkpoint  # noqa: E402
from checkpoints import load_backbone  # noqa: E402
from curve_pictures import draw_panels, make_panels, read_run  # noqa: E402
from davis_metrics import score_folder, summarise  # noqa: E402
from distributed import Processes  # noqa: E402
from errors import (  # noqa: E402
    CONTINUE_STATUS,
    ArgumentParser,
    ConfigError,
    RunStopped,
    TrainingError,
    run_main,
    user_path,
)
from main_selfpatch import build_run  # noqa: E402
from options import get_args_parser as pretraining_parser  # noqa: E402
from patch_features import PatchFeatures  # noqa: E402
from results import write_json  # noqa: E402
from resuming import IRRELEVANT, plain_args, with_batch  # noqa: E402
from utils import fix_random_seeds  # noqa: E402

UNTRAINED, DINO, SELFPATCH = METHODS = ("random", "DINO", "SelfPatch")
HELD_OUT = 1000  # scenes for the k-NN of the curves, and how much higher the seed is that they are drawn with
CURVES = ("image loss", "patch loss", "k-NN top-1, %")

# ----------------------------------------------------------------------------------------------------------------------
# Jobs, and the time for them


class Jobs:
    """Starts jobs of this project, one after the other, until the time is up.

    Args:
        minutes: after which a job is asked to end and no other is started; 0 for no limit.
    """

    def __init__(self, minutes: float):
        self.minutes, self.end = minutes, time.monotonic() + 60 * minutes if minutes else math.inf

    def check(self) -> None:
        """Raises RunStopped if the time is up."""
        if time.monotonic() >= self.end:
            raise RunStopped(f"--minutes {self.minutes:g} are over: start the same command again to go on")

    def __call__(self, *words: str) -> None:
        """Run a job, showing the command.

        Raises:
            RunStopped: the time is up, or the job was asked to end; a run has saved.
            TrainingError: the job failed, and has said why.
        """
        self.check()
        print(f"\n$ python {' '.join(words)}", flush=True)
        process = subprocess.Popen([sys.executable, str(ROOT / words[0]), *words[1:]])
        try:
            process.wait(None if self.end == math.inf else max(self.end - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            print(f"--minutes {self.minutes:g} are over: asking {words[0]} to end", flush=True)
        finally:
            if process.poll() is None:
                process.terminate()
            status = process.wait()
        if status in (CONTINUE_STATUS, -signal.SIGTERM):
            self.check()
            raise RunStopped(f"{words[0]} was asked to end: start the same command again to go on")
        if status:
            raise TrainingError(f"{words[0]} failed with status {status}; its message is above")


def stop(*_) -> None:
    """The handler of SIGTERM: the job under way is asked to end as well."""
    raise RunStopped("SIGTERM: start the same command again to go on", signal.SIGTERM)


# ----------------------------------------------------------------------------------------------------------------------
# Two settings: what is trained on, by which recipe, and what is measured


class Scenes:
    """The demo's scenes, network, recipe and figures; each seed has scenes of its own."""

    def __init__(self, args: argparse.Namespace, jobs: Jobs):
        self.args, self.epochs = args, args.epochs or 15
        self.unseen = functools.cache(demo.make_unseen)

    def place(self, seed: int) -> Path:
        return self.args.output_dir / f"seed{seed}"

    def prepare(self, seed: int) -> None:
        demo.make_images(self.place(seed) / "scenes", self.args.scenes, seed)
        demo.make_images(self.place(seed) / "held_out", HELD_OUT, HELD_OUT + seed)

    def words(self, seed: int, output: Path) -> list[str]:
        return [*demo.pretraining(self.place(seed) / "scenes", output, self.epochs, seed),
                "--knn_data", str(self.place(seed) / "held_out"), "--knn_every", "1"]

    def description(self) -> dict:
        return {"data": "scenes", "scenes": self.args.scenes}

    def evaluations(self, seed: int, folder: Path) -> dict[str, Callable[[Path], None]]:
        """By name: what writes the evaluation's JSON file."""
        return {"scenes": lambda output: write_json(
            demo.measure(load_backbone(folder / "run"), self.unseen(seed)).figures, output)}

    def figures(self, folder: Path) -> dict[str, float]:
        return read(folder / "scenes.json")

    def overlay(self, output: Path, seed: int) -> None:
        """The first clip of a seed."""
        clip = self.unseen(seed).clips[0]
        demo.write_clip(output, clip, {"true": clip.objects} | {
            name: demo.follow(PatchFeatures(load_backbone(self.place(seed) / name / "run")), clip)
            for name in METHODS})


class Photographs:
    """ViT-S/16 on the photographs of --data_path, and the evaluations as they are published, as jobs of their own.

    100 epochs of 10,000 images are 73 steps each: few prototypes, small crops, half of the published length.
    """

    def __init__(self, args: argparse.Namespace, jobs: Jobs):
        self.args, self.jobs, self.epochs = args, jobs, args.epochs or 100

    def place(self, seed: int) -> Path:
        return self.args.output_dir / f"seed{seed}"

    def prepare(self, seed: int) -> None:
        pass

    def words(self, seed: int, output: Path) -> list[str]:
        words = ["main_selfpatch.py", "--arch", "vit_small", "--patch_size", 16, "--data_path",
                 self.args.data_path / "train", "--output_dir", output, "--seed", seed, "--epochs", self.epochs,
                 "--warmup_epochs", self.epochs // 10, "--batch_size_per_gpu", 128, "--lr", 0.001, "--out_dim", 4096,
                 "--out_dim_selfpatch", 1024, "--global_crops_size", 112, "--local_crops_size", 48,
                 "--local_crops_number", 4, "--num_workers", min(16, os.cpu_count() or 1), "--saveckp_freq", 0,
                 "--save_every_minutes", 3, "--knn_data", self.args.data_path, "--knn_every", 10]
        return [str(word) for word in words]

    def description(self) -> dict:
        paths = {name: getattr(self.args, name) for name in ("data_path", "davis_path", "segmentation_path")}
        return {"data": "photographs"} | {name: str(path) for name, path in paths.items() if path}

    def evaluations(self, seed: int, folder: Path) -> dict[str, Callable[[Path], None]]:
        """By name: what writes the evaluation's JSON file."""
        options = pretraining_parser().parse_args([*self.words(seed, folder / "run")[1:], *self.args.others])
        common = ["--pretrained_weights", str(folder / "run"), "--device", options.device]
        loading = [*common, "--num_workers", str(options.num_workers)]
        found = {"knn": lambda output: self.jobs(
            "eval_knn.py", "--data_path", str(self.args.data_path), "--nb_knn", "20", "--image_size",
            str(options.global_crops_size), "--output", str(output), *loading)}
        if self.args.segmentation_path:
            classes = ["--num_classes", str(self.args.num_classes)] if self.args.num_classes else []
            found["dense"] = lambda output: self.jobs("eval_dense_retrieval.py", "--data", self.args.segmentation_path,
                                                      *classes, "--output", str(output), *loading)
        if self.args.davis_path:
            found["davis"] = lambda output: self.davis(output, folder / "masks", common)
        return found

    def davis(self, output: Path, masks: Path, common: list[str]) -> None:
        self.jobs("eval_video_segmentation.py", "--data_path", str(self.args.davis_path), "--output_dir", str(masks),
                  "--no_score", *common)
        figures, _ = summarise(score_folder(self.args.davis_path, masks), {})
        write_json({"J&F": figures["J&F-Mean"]}, output)

    def figures(self, folder: Path) -> dict[str, float]:
        knn, dense = (read(folder / f"{name}.json").get("networks") for name in ("knn", "dense"))
        found = read(folder / "davis.json")
        if knn:
            found["k-NN"] = next(iter(knn[0]["knn"].values()))["top1"] / 100
        if dense:
            found["mean IoU"] = dense[0]["figures"]["mean IoU, all classes"]
        return found

    def overlay(self, output: Path, seed: int) -> None:
        """The first sequence of DAVIS, where there is one."""
        if self.args.davis_path:
            masks = [str(self.place(seed) / name / "masks") for name in METHODS]
            self.jobs("visualize.py", "overlay", "--davis_path", str(self.args.davis_path), "--results", *masks,
                      "--labels", *METHODS, "--output", str(output), "--overwrite")


# ----------------------------------------------------------------------------------------------------------------------
# The work


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def write_untrained(words: list[str], output: Path) -> None:
    """The checkpoint that training with these words begins with."""
    options = pretraining_parser().parse_args(words[1:])
    fix_random_seeds(options.seed)
    run = build_run(options, Processes(), steps_per_epoch=1)
    output.mkdir(parents=True, exist_ok=True)
    write_checkpoint({"teacher": run.teacher.state_dict(), "epoch": 0, "args": plain_args(options, 1)},
                     output / "checkpoint.pth")


def pretrain(jobs: Jobs, words: list[str], record: Path) -> None:
    """Run the job of these words, unless its record says that it is done, and add to the time in the record."""
    batch = with_batch(vars(pretraining_parser().parse_args(words[1:])) | {"world_size": 1})["batch"]
    spent = read(record) or {"done": False, "batch": batch, "seconds": 0.0, "CPU s": 0.0}
    if spent["done"]:
        return
    start, cpu_start = time.monotonic(), cpu_seconds()
    try:
        jobs(*words)
        spent["done"] = True
    finally:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(spent | {"seconds": spent["seconds"] + time.monotonic() - start,
                            "CPU s": spent["CPU s"] + cpu_seconds() - cpu_start}, record)


def work(setting: Scenes | Photographs, jobs: Jobs, seed: int, method: str, weight: float) -> None:
    """Train and evaluate one network, as far as that is not done."""
    folder = setting.place(seed) / method
    words = [*setting.words(seed, folder / "run"), *setting.args.others, "--patch_loss_weight", str(weight)]
    if method != UNTRAINED:
        pretrain(jobs, words, folder / "training.json")
    elif not (folder / "run" / "checkpoint.pth").is_file():
        write_untrained(words, folder / "run")
    for name, evaluate in setting.evaluations(seed, folder).items():
        if not (folder / f"{name}.json").is_file():
            jobs.check()
            evaluate(folder / f"{name}.json")


# ----------------------------------------------------------------------------------------------------------------------
# What is reported


def training_figures(folder: Path) -> Figures:
    """Losses of the last epoch, images and time of a run that is done."""
    options, (steps, epochs) = read(folder / "training.json"), read_run(folder / "run")
    found = {"image loss": epochs[-1]["train_clsloss"], "patch loss": epochs[-1]["train_patchloss"],
             "images": options["batch"] * steps[-1]["step"], "seconds": options["seconds"], "CPU s": options["CPU s"]}
    if not found["patch loss"]:  # DINO has none
        del found["patch loss"]
    return found


def collect(setting: Scenes | Photographs, seeds: list[int]) -> dict[int, dict[str, Figures]]:
    """The figures that there are, by seed and method."""
    found = {}
    for seed in seeds:
        for method in METHODS:
            folder = setting.place(seed) / method
            figures = setting.figures(folder)
            if read(folder / "training.json").get("done"):
                figures |= training_figures(folder)
            if figures:
                found.setdefault(seed, {})[method] = figures
    return found


def draw_curves(setting: Scenes | Photographs, seeds: list[int], output: Path) -> None:
    """Losses and k-NN while training, a line for each run and a colour for each method."""
    folders = {(seed, method): setting.place(seed) / method / "run" for method in METHODS[1:] for seed in seeds}
    panels = [panel for panel in make_panels([read_run(folder) for folder in folders.values()])
              if panel.title in CURVES]
    draw_panels(panels, [method for _, method in folders]).savefig(output, dpi=150)
    print(f"wrote {output}")


def report(setting: Scenes | Photographs, args: argparse.Namespace) -> None:
    """Print the tables of what there is, and write them as JSON."""
    found = collect(setting, args.seeds)
    if not found:
        return
    print(f"\n{setting.epochs} epochs, patch loss weight {args.patch_loss_weight:g} of {SELFPATCH}; figures of frozen "
          f"features from 0 to 1, losses of the last epoch; ± is the standard deviation between seeds")
    print(all_tables(found, (DINO, SELFPATCH)))
    (args.output_dir / "figures.json").unlink(missing_ok=True)
    write_json({"figures": found, "differences": differences(found, (DINO, SELFPATCH))},
               args.output_dir / "figures.json")


# ----------------------------------------------------------------------------------------------------------------------
# The command


def get_parser() -> ArgumentParser:
    parser = ArgumentParser(description="DINO, SelfPatch and no training: one recipe, all evaluations, several seeds; "
                                        "other options are those of main_selfpatch.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights, images' order and scenes")
    parser.add_argument("--output_dir", type=user_path, default=Path("runs/evidence"), help="where everything goes")
    parser.add_argument("--epochs", type=int, help="default: 15 of the scenes, 100 of photographs")
    parser.add_argument("--patch_loss_weight", type=float, default=0.1, help="SelfPatch's; DINO's is 0")
    parser.add_argument("--minutes", type=float, default=0,
                        help="end after so many, saved: the same command again goes on; 0: no limit")
    parser.add_argument("--scenes", type=int, default=2000, help="to train on, without --data_path")
    parser.add_argument("--data_path", type=user_path, help="folder with train/ and val/ of class folders of "
                                                            "photographs, in place of the scenes")
    parser.add_argument("--davis_path", type=user_path, help="DAVIS, for J & F of the photographs' networks")
    parser.add_argument("--segmentation_path", help="eval_dense_retrieval.py's --data, for their mean IoU")
    parser.add_argument("--num_classes", type=int, help="of --segmentation_path folders:")
    return parser


def check_settings(path: Path, settings: dict) -> None:
    """Write the settings of a folder of figures, or find out whether they are still the same.

    An evaluation may be added later.

    Raises:
        ConfigError: one has changed, and what is there would be mixed with other figures.
    """
    settings, known = json.loads(json.dumps(settings)), read(path)
    changed = [f"{name} {settings[name]} (there {known[name]})" for name in known
               if name in settings and known[name] != settings[name]]
    if changed:
        raise ConfigError(f"{path.parent} has figures of other settings: {', '.join(changed)}; give its values, or "
                          "choose another --output_dir")
    if settings.keys() - known.keys():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(known | settings, path)


def check_options(args: argparse.Namespace) -> None:
    """Raise ConfigError for what cannot work."""
    for name, least in (("epochs", 1), ("scenes", 1), ("minutes", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ConfigError(f"--{name} {getattr(args, name)}: give {least} or more")
    if args.patch_loss_weight <= 0:
        raise ConfigError(f"--patch_loss_weight {args.patch_loss_weight:g}: is SelfPatch's, give more than 0")
    if (args.davis_path or args.segmentation_path) and not args.data_path:
        raise ConfigError("--davis_path and --segmentation_path go with --data_path: the scenes have their own clips "
                          "and materials")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("curves need the package matplotlib: pip install matplotlib")


def main(args: argparse.Namespace, others: list[str]) -> None:
    """Raises ConfigError for options, TrainingError for a job that failed, RunStopped where time is up."""
    check_options(args)
    args.others, jobs = others, Jobs(args.minutes)
    setting = (Photographs if args.data_path else Scenes)(args, jobs)
    options = vars(pretraining_parser().parse_args([*setting.words(0, args.output_dir)[1:], *others]))
    decisive = {name: value for name, value in with_batch(options | {"world_size": 1}).items()
                if name not in IRRELEVANT | {"seed"}}
    check_settings(args.output_dir / "settings.json",
                   decisive | {"patch_loss_weight": args.patch_loss_weight} | setting.description())
    signal.signal(signal.SIGTERM, stop)
    try:
        for seed in args.seeds:
            setting.prepare(seed)
            for method in METHODS:
                work(setting, jobs, seed, method, args.patch_loss_weight if method == SELFPATCH else 0)
        draw_curves(setting, args.seeds, args.output_dir / "curves.png")
        setting.overlay(args.output_dir / "overlay.gif", args.seeds[0])
    finally:
        report(setting, args)


if __name__ == "__main__":
    run_main(main, *get_parser().parse_known_args())
