"""A two-minute demo: make a small data set of moving objects, pretrain a ViT-Tiny on it, and see what it does.

    python demo.py                  # everything goes to runs/demo
"""
import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from davis_data import imwrite_indexed
from errors import run_main, user_path

ROOT = Path(__file__).resolve().parent
SIZE = (160, 120)  # of a training image, width and height
SCENES, FRAMES = 64, 5  # clips, and training images from each
CLIP_SEED, CLIP_FRAMES, CLIP_SIZE = 1001, 15, (426, 240)
LIGHT = 0.45  # radians per frame by which the colour of the light moves
PROTOTYPES, PATCH_PROTOTYPES = 1024, 256

# ----------------------------------------------------------------------------------------------------------------------
# The data: textured blobs drifting over a textured background


def texture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Two colours mixed by smooth noise of random scale, as an RGB image."""
    low, high = rng.integers(0, 256, (2, 3))
    grain = int(rng.choice([4, 8, 16, 32]))
    noise = rng.random((grain * height // width + 2, grain + 2)).astype(np.float32)
    mix = np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    return Image.fromarray((low * mix + high * (1 - mix)).astype(np.uint8))


class Blob:
    """An object with a wavy outline, a texture, a position, a speed and a spin."""

    def __init__(self, rng: np.random.Generator, width: int):
        self.radius = rng.uniform(0.1, 0.2) * width
        self.position = rng.uniform(0.25, 0.75, 2) * width
        self.speed = rng.uniform(-0.02, 0.02, 2) * width
        self.spin, self.lobes, self.waviness = rng.uniform(-0.1, 0.1), rng.integers(2, 6), rng.uniform(0.05, 0.35)
        self.texture = texture(rng, int(2.8 * self.radius), int(2.8 * self.radius))
        angle = np.linspace(0, 2 * math.pi, 60, endpoint=False)
        r = self.radius * (1 + self.waviness * np.cos(self.lobes * angle))
        center = self.texture.width / 2
        self.stencil = Image.new("L", self.texture.size)
        ImageDraw.Draw(self.stencil).polygon(
            list(zip(center + r * np.cos(angle), center + r * np.sin(angle), strict=True)), fill=255)

    def paint(self, frame: Image.Image, mask: Image.Image, number: int, time_step: int) -> None:
        degrees = math.degrees(self.spin) * time_step
        stencil = self.stencil.rotate(degrees, Image.Resampling.BILINEAR)
        corner = tuple((self.position + self.speed * time_step - self.texture.width / 2).round().astype(int).tolist())
        frame.paste(self.texture.rotate(degrees, Image.Resampling.BILINEAR), corner, stencil)
        mask.paste(number, corner, stencil.point(lambda v: 255 * (v > 127)))


def clip(seed: int, frames: int, width: int, height: int) -> tuple[list[Image.Image], list[Image.Image]]:
    """Frames (RGB) and masks (object ids, 0 the background) of a scene with two or three objects."""
    rng = np.random.default_rng(seed)
    background, blobs = texture(rng, width, height), [Blob(rng, width) for _ in range(rng.integers(2, 4))]
    images, masks, phase = [], [], rng.uniform(0, 2 * math.pi, 3)
    for t in range(frames):
        frame, mask = background.copy(), Image.new("L", background.size)
        for number, blob in enumerate(blobs, 1):
            blob.paint(frame, mask, number, t)
        # light that changes by channel, and sensor noise: raw colours help for a few frames only
        light = 0.75 + 0.25 * np.cos(phase + LIGHT * t)
        noise = rng.normal(0, 12, (height, width, 3))
        pixels = (np.asarray(frame) * light + noise).clip(0, 255).astype(np.uint8)
        images.append(Image.fromarray(pixels))
        masks.append(mask)
    return images, masks


def make_data(folder: Path) -> None:
    """Training images as an ImageFolder in folder/images, unless they exist."""
    images = folder / "images" / "scenes"
    images.mkdir(parents=True, exist_ok=True)
    if len(list(images.iterdir())) == SCENES * FRAMES:
        return
    for scene in tqdm(range(SCENES), desc="making scenes", unit="scene"):
        for t, frame in enumerate(clip(scene, FRAMES, *SIZE)[0]):
            frame.save(images / f"{scene:03}_{t}.jpg", quality=95)


def make_clip(folder: Path) -> None:
    """A clip that is not trained on, with its masks, as a DAVIS data set in folder/davis."""
    davis = folder / "davis"
    paths = [davis / kind / "480p" / "scene" for kind in ("JPEGImages", "Annotations")]
    for path in (*paths, davis / "ImageSets" / "2017"):
        path.mkdir(parents=True, exist_ok=True)
    for t, (frame, mask) in enumerate(zip(*clip(CLIP_SEED, CLIP_FRAMES, *CLIP_SIZE), strict=True)):
        frame.save(paths[0] / f"{t:05}.jpg", quality=95)
        imwrite_indexed(paths[1] / f"{t:05}.png", np.asarray(mask))
    (davis / "ImageSets" / "2017" / "val.txt").write_text("scene\n")


# ----------------------------------------------------------------------------------------------------------------------
# The jobs


def run(*words: str | Path) -> None:
    """Run a job of this project, showing the command.

    Raises:
        subprocess.CalledProcessError: the job failed.
    """
    print(f"\n$ python {' '.join(map(str, words))}", flush=True)
    subprocess.run([sys.executable, str(ROOT / words[0]), *map(str, words[1:])], check=True)


def pretrain(folder: Path, epochs: int) -> None:
    run("main_selfpatch.py", "--arch", "vit_tiny", "--data_path", folder / "images",
        "--output_dir", folder / "vit_tiny", "--epochs", epochs, "--warmup_epochs", 1, "--batch_size_per_gpu", 16,
        "--lr", 0.008, "--momentum_teacher", 0.99, "--global_crops_size", 64, "--local_crops_size", 48,
        "--local_crops_number", 2, "--out_dim", PROTOTYPES, "--out_dim_selfpatch", PATCH_PROTOTYPES,
        "--num_workers", 1, "--log_every", 5, "--saveckp_freq", 0)


def evaluate(folder: Path, name: str, *weights: str | Path) -> None:
    run("eval_video_segmentation.py", "--data_path", folder / "davis", "--output_dir", folder / "masks" / name,
        "--arch", "vit_tiny", *weights)


def report_losses(log: Path) -> None:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    print(f"\nlosses by epoch (a head that learns nothing stays at ln K: {math.log(PROTOTYPES):.2f} for images, "
          f"{math.log(PATCH_PROTOTYPES):.2f} for patches):")
    for row in rows:
        print(f"  epoch {row['epoch']}: image {row['train_clsloss']:.3f}, patch {row['train_patchloss']:.3f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=user_path, default=Path("runs/demo"), help="where everything goes")
    parser.add_argument("--epochs", type=int, default=5, help="passes through the training images")
    args = parser.parse_args()
    try:
        show(args.output_dir, args.epochs)
    except subprocess.CalledProcessError as error:
        return error.returncode  # the job has said why
    return 0


def show(folder: Path, epochs: int) -> None:
    """The whole demo, in a folder of its own."""
    start = time.time()
    make_data(folder)
    make_clip(folder)
    evaluate(folder, "before", "--random_weights")
    pretrain(folder, epochs)
    evaluate(folder, "after", "--pretrained_weights", folder / "vit_tiny" / "checkpoint.pth")
    for drawing, output in (("scores", folder / "scores.png"), ("overlay", folder / "overlay.gif")):
        run("visualize.py", drawing, "--davis_path", folder / "davis", "--results", folder / "masks" / "before",
            folder / "masks" / "after", "--labels", "before", "after", "--output", output, "--overwrite")

    report_losses(folder / "vit_tiny" / "log.txt")
    print("both losses should be below ln K by now. The J&F above falls: an untrained network follows these blobs by "
          "their colours, and two minutes of training unlearn more of that than they teach")
    print(f"look at {folder}: images (the data), vit_tiny (log.txt, checkpoint.pth), overlay.gif (the clip, and its "
          f"masks before and after), scores.png. {time.time() - start:.0f} s in all")


if __name__ == "__main__":
    run_main(main)
