"""What evidence.py trains on and measures: the demo's scenes, or photographs with DAVIS and a segmented data set."""
import argparse
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from evidence_tables import Figures

import demo
from selfpatch.checkpoints.loading import load_backbone
from selfpatch.errors import CONTINUE_STATUS, RunStopped, TrainingError
from selfpatch.evaluation.tables import write_json
from selfpatch.pretraining.options import get_args_parser as pretraining_parser
from selfpatch.video.frame_features import FrameFeatures
from selfpatch.video.scores import score_folder, summarise

ROOT = Path(__file__).resolve().parents[1]
UNTRAINED, DINO = "random", "DINO"
HELD_OUT = 1000  # scenes for the k-NN of the curves, and how much higher the seed is that they are drawn with

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


# ----------------------------------------------------------------------------------------------------------------------
# Two settings: what is trained on, by which recipe, and what is measured


class Setting:
    """What the two settings share. Beside it, each of them has

    - words(seed, output): the job that pretrains, without the python before it and without --patch_loss_weight,
    - description(): the options that name the data,
    - evaluations(seed, folder): by name, what writes the JSON file of an evaluation of the network in folder,
    - figures(folder): what the evaluations have found so far, from 0 to 1,
    - overlay(output, seed): draws masks that each network's features have led through one clip, side by side.

    Args:
        args: the options of evidence.py, and in others those that are passed on to main_selfpatch.py.

    Attributes:
        weights: of the patch loss, by method.
    """

    EPOCHS: int

    def __init__(self, args: argparse.Namespace, jobs: Jobs):
        self.args, self.jobs, self.epochs = args, jobs, args.epochs or self.EPOCHS
        self.weights = {UNTRAINED: 0.0, DINO: 0.0} | {f"SelfPatch {w:g}": w for w in args.patch_loss_weight}

    def place(self, seed: int) -> Path:
        """The folder of a seed, which has one for each method, with the run in it."""
        return self.args.output_dir / f"seed{seed}"

    def prepare(self, seed: int) -> None:
        """Make the data, where that is needed."""


class Scenes(Setting):
    """The demo's scenes, network, recipe and figures; each seed has scenes of its own."""

    EPOCHS = 8

    def __init__(self, args: argparse.Namespace, jobs: Jobs):
        super().__init__(args, jobs)
        self.unseen = functools.cache(demo.make_unseen)

    def prepare(self, seed: int) -> None:
        demo.make_images(self.place(seed) / "scenes", self.args.scenes, seed)
        demo.make_images(self.place(seed) / "held_out", HELD_OUT, HELD_OUT + seed)

    def words(self, seed: int, output: Path) -> list[str]:
        return [*demo.pretraining(self.place(seed) / "scenes", output, self.epochs, seed),
                "--knn_data", str(self.place(seed) / "held_out"), "--knn_every", "1"]

    def description(self) -> dict:
        return {"data": "scenes", "scenes": self.args.scenes}

    def evaluations(self, seed: int, folder: Path) -> dict[str, Callable[[Path], None]]:
        return {"scenes": lambda output: write_json(
            demo.measure(load_backbone(folder / "run"), self.unseen(seed)).figures, output)}

    def figures(self, folder: Path) -> Figures:
        return read(folder / "scenes.json")

    def overlay(self, output: Path, seed: int) -> None:
        """The first clip of a seed."""
        clip = self.unseen(seed).clips[0]
        demo.write_clip(output, clip, {"true": clip.objects} | {
            name: demo.follow(FrameFeatures(load_backbone(self.place(seed) / name / "run")), clip)
            for name in self.weights})


class Photographs(Setting):
    """ViT-S/16 on the photographs of --data_path, and the evaluations as jobs of their own, by their protocols.

    The recipe is for some 10,000 images of 10 classes in minutes on a GPU: crops of half the published side (a fifth of
    the tokens), and fewer prototypes. k-NN is at the size of the global crops, as in the curves.
    """

    EPOCHS = 100

    def words(self, seed: int, output: Path) -> list[str]:
        words = ["main_selfpatch.py", "--arch", "vit_small", "--patch_size", 16, "--data_path",
                 self.args.data_path / "train", "--output_dir", output, "--seed", seed, "--epochs", self.epochs,
                 "--warmup_epochs", self.epochs // 10, "--batch_size_per_gpu", 128, "--lr", 0.001, "--out_dim", 4096,
                 "--out_dim_selfpatch", 1024, "--global_crops_size", 112, "--local_crops_size", 48,
                 "--local_crops_number", 4, "--num_workers", min(16, os.cpu_count() or 1), "--saveckp_freq", 0,
                 "--save_every_minutes", 3, "--knn_data", self.args.data_path, "--knn_every", 10]
        return [str(word) for word in words]

    def description(self) -> dict:
        found = {"data": "photographs", "data_path": str(self.args.data_path.resolve())}
        if self.args.davis_path:
            found["davis_path"] = str(self.args.davis_path.resolve())
        if self.args.segmentation_path:
            found |= {"segmentation_path": self.args.segmentation_path, "num_classes": self.args.num_classes}
        return found

    def evaluations(self, seed: int, folder: Path) -> dict[str, Callable[[Path], None]]:
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

    def figures(self, folder: Path) -> Figures:
        knn, dense = (read(folder / f"{name}.json").get("networks") for name in ("knn", "dense"))
        found = read(folder / "davis.json")
        if knn:
            found["k-NN"] = next(iter(knn[0]["knn"].values()))["top1"] / 100
        if dense:
            found["mean IoU"] = dense[0]["figures"]["mean IoU, all classes"]
        return found

    def overlay(self, output: Path, seed: int) -> None:
        """The first sequence of DAVIS, where that is given."""
        if self.args.davis_path:
            masks = [str(self.place(seed) / name / "masks") for name in self.weights]
            self.jobs("visualize.py", "overlay", "--davis_path", str(self.args.davis_path), "--results", *masks,
                      "--labels", *self.weights, "--output", str(output), "--overwrite")


def read(path: Path) -> dict:
    """A JSON file's content, {} where there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}
