"""A demo of a few minutes: draw scenes, pretrain a small ViT on them without labels, and show what it has learnt.

    python demo.py                  # everything goes to runs/demo; look at runs/demo/before_after.png

The network, vit_pico, and the scenes (selfpatch/visualization/scenes.py) are for trying things on a CPU. All figures
are for unseen scenes, before and after training; benchmarks/demo_seeds.py computes them for several seeds.
"""
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from selfpatch.checkpoints.loading import load_backbone
from selfpatch.errors import ArgumentParser, run_main, user_path
from selfpatch.evaluation.dense_retrieval import PatchMemory, label_map, patch_labels
from selfpatch.evaluation.knn import classify
from selfpatch.evaluation.segmentation import confusion_matrix, mean_iou
from selfpatch.evaluation.tables import format_table
from selfpatch.method.vision_transformer import VisionTransformer, vit_pico
from selfpatch.pretraining.resuming import fix_random_seeds
from selfpatch.video.davis import DAVIS_PALETTE
from selfpatch.video.frame_features import FrameFeatures
from selfpatch.video.label_propagation import to_mask, to_one_hot
from selfpatch.video.propagation_bounds import propagate
from selfpatch.video.scores import score_sequence
from selfpatch.visualization.features import labelled_panels
from selfpatch.visualization.scenes import NAMES, Motion, Scene, draw_scene
from selfpatch.visualization.videos import overlay, write_video

ROOT = Path(__file__).resolve().parent
PATCH = 8
PROTOTYPES = 256  # of each head
MEMORY, TESTED, CLIPS, FRAMES = 24, 200, 6, 12  # labelled scenes, tested scenes, clips, frames of a clip
TRAINING, UNSEEN, MOVING = range(3)  # random streams for scenes
NEIGHBOURS = 5  # voting for an image's class

# ----------------------------------------------------------------------------------------------------------------------
# The data


def training_scene(seed: int, number: int) -> Scene:
    return draw_scene(np.random.default_rng((seed, TRAINING, number)), 64, 64, objects=(0, 1), radius=(10, 18),
                      ground=number % len(NAMES))


def unseen_scene(seed: int, number: int) -> Scene:
    return draw_scene(np.random.default_rng((seed, UNSEEN, number)), 96, 96, ground=number % len(NAMES))


def clip(seed: int, number: int) -> Scene:
    """Two or three moving objects in changing light."""
    return draw_scene(np.random.default_rng((seed, MOVING, number)), 320, 240, objects=(2, 3), radius=(34, 52),
                      motion=Motion(FRAMES, speed=5, light=0.35))


def make_images(folder: Path, count: int, seed: int) -> None:
    """Write the training images as an ImageFolder, one folder per material of the ground, unless they exist."""
    done = folder / "done.json"
    if done.is_file() and json.loads(done.read_text()) == [count, seed]:
        return
    for name in NAMES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for old in (folder / name).glob("[0-9]*.jpg"):
            old.unlink()
    for number in tqdm(range(count), desc="drawing scenes", unit="scene"):
        scene = training_scene(seed, number)
        ground = NAMES[number % len(NAMES)]
        Image.fromarray(scene.frames[0]).save(folder / ground / f"{number:05}.jpg", quality=95)
    done.write_text(json.dumps([count, seed]))


class Unseen(NamedTuple):
    """Unseen scenes: images [n, 96, 96, 3], their materials [n, 96, 96], and clips."""
    images: np.ndarray
    materials: torch.Tensor
    clips: list[Scene]


def make_unseen(seed: int) -> Unseen:
    scenes = [unseen_scene(seed, number) for number in range(MEMORY + TESTED)]
    return Unseen(np.concatenate([scene.frames for scene in scenes]),
                  torch.from_numpy(np.concatenate([scene.materials for scene in scenes])),
                  [clip(seed, number) for number in range(CLIPS)])


# ----------------------------------------------------------------------------------------------------------------------
# Training, as a user starts it


def run(*words: str) -> None:
    """Print and run the command of a job.

    Raises:
        subprocess.CalledProcessError: the job failed.
    """
    print(f"\n$ python {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]], check=True)


def initial_backbone(seed: int) -> VisionTransformer:
    """The network with the initial weights of training with this seed."""
    fix_random_seeds(seed)
    return vit_pico(PATCH)


def pretraining(scenes: Path, output: Path, epochs: int, seed: int) -> list[str]:
    """Command of the job that pretrains on the folder of scenes, without `python`."""
    words = ["main_selfpatch.py", "--arch", "vit_pico", "--patch_size", PATCH, "--data_path", scenes,
             "--output_dir", output, "--seed", seed, "--epochs", epochs, "--warmup_epochs", min(1, epochs - 1),
             "--warmup_teacher_temp", 0.03, "--teacher_temp", 0.03,
             "--batch_size_per_gpu", 32, "--lr", 0.008, "--momentum_teacher", 0.99, "--weight_decay_end", 0.1,
             "--drop_path_rate", 0, "--use_bn_in_head", "true", "--head_hidden_dim", 256, "--out_dim", PROTOTYPES,
             "--out_dim_selfpatch", PROTOTYPES, "--global_crops_size", 64, "--global_crops_scale", 0.25, 1,
             "--local_crops_size", 40, "--local_crops_scale", 0.1, 0.3, "--local_crops_number", 2,
             "--patch_loss_weight", 0.03, "--num_workers", 1, "--saveckp_freq", 0]
    return [str(word) for word in words]


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation, by the functions of eval_knn.py, eval_dense_retrieval.py and eval_video_segmentation.py


class Findings(NamedTuple):
    """Three figures in 0 … 1; the tested images' materials [n, H, W], the clips' masks [T, H, W] and J & F."""
    figures: dict[str, float]
    materials: np.ndarray
    masks: list[np.ndarray]
    scores: list[float]


@torch.inference_mode()
def measure(backbone: VisionTransformer, unseen: Unseen) -> Findings:
    extract = FrameFeatures(backbone.eval(), batch_size=50)
    features = extract(unseen.images)  # [n, h, w, D]
    materials = retrieve(features, unseen.materials)
    confusion = confusion_matrix(unseen.materials[MEMORY:], materials, len(NAMES))
    masks = [follow(extract, scene) for scene in unseen.clips]
    scores = [np.mean(score_sequence(scene.objects, found)) for scene, found in zip(unseen.clips, masks, strict=True)]
    return Findings({"J&F": float(np.mean(scores)), "mean IoU": mean_iou(confusion.numpy()),
                     "k-NN": tell_grounds(features)}, materials.numpy(), masks, scores)


def tell_grounds(features: torch.Tensor) -> float:
    """Share of the tested images whose ground k-NN finds, by the means of their patches' features [n, h, w, D]."""
    grounds = torch.arange(len(features)) % len(NAMES)
    whole = F.normalize(features.mean((1, 2)), dim=1)
    top1 = classify(whole[MEMORY:], grounds[MEMORY:], whole[:MEMORY], grounds[:MEMORY], len(NAMES), [NEIGHBOURS])
    return top1[min(NEIGHBOURS, MEMORY)].top1 / 100


def retrieve(features: torch.Tensor, materials: torch.Tensor) -> torch.Tensor:
    """Materials of the tested images [n, H, W], by the most similar patches of the labelled ones."""
    memory = PatchMemory(features[:MEMORY].flatten(0, 2).shape[0], features.shape[-1], len(NAMES))
    memory.add(features[:MEMORY].flatten(0, 2), patch_labels(materials[:MEMORY], len(NAMES), PATCH).flatten(0, 2))
    votes = memory.vote(features[MEMORY:].flatten(0, 2)).unflatten(0, features[MEMORY:].shape[:3])
    return torch.stack([label_map(one, materials.shape[1:]) for one in votes])


def follow(extract: FrameFeatures, scene: Scene) -> np.ndarray:
    """Masks of a clip [T, H, W], propagated from the first frame."""
    first, shape = scene.objects[0], scene.objects.shape[1:]
    labels = to_one_hot(torch.from_numpy(first[PATCH // 2::PATCH, PATCH // 2::PATCH]))[0]
    features = (one for frames in np.array_split(scene.frames, 3) for one in extract(frames))
    return np.stack([first, *(to_mask(soft, PATCH, *shape).numpy() for soft in propagate(features, labels))])


# ----------------------------------------------------------------------------------------------------------------------
# Figures and pictures

MEANING = {
    "J&F": "the first frame's masks follow the objects through {clips} clips; 1 is perfect",
    "mean IoU": "patches get the material of the most similar of {memory} labelled images; 1 is perfect, chance 0.07",
    "k-NN": "the material of the ground, by the {neighbours} most similar of those images; 1 is perfect, chance 0.12"}


def report(before: dict[str, float], after: dict[str, float]) -> None:
    rows = [[name, f"{before[name]:.3f}", f"{after[name]:.3f}"] for name in after]
    header, *lines = format_table(["", "before", "after"], rows).splitlines()
    print(f"\non scenes that were not trained on, of the untrained network and of the trained one:\n{header}")
    for name, line in zip(after, lines, strict=True):
        print(f"{line}  {MEANING[name].format(clips=CLIPS, memory=MEMORY, neighbours=NEIGHBOURS)}")


def tinted(image: np.ndarray, ids: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Enlarge an image, and tint each id above 0 with its colour."""
    large = (np.asarray(Image.fromarray(part).resize(size, way)) for part, way in
             ((image, Image.Resampling.BICUBIC), (ids.astype(np.uint8), Image.Resampling.NEAREST)))
    return Image.fromarray(overlay(*large, DAVIS_PALETTE))


def draw(folder: Path, unseen: Unseen, before: Findings, after: Findings) -> None:
    """Draw before_after.png, the clips' last frames and materials of some images; and clip.gif, the first clip.

    The images are those at the quartiles of the gain, as typical ones.
    """
    panels, true = [], unseen.materials[MEMORY:].numpy()
    for number, scene in enumerate(unseen.clips[:3]):
        panels += [(name, tinted(scene.frames[t], masks[t], (320, 240))) for name, t, masks in (
            ("first frame, given", 0, scene.objects), ("last frame, true", -1, scene.objects),
            (f"before, J&F {before.scores[number]:.2f}", -1, before.masks[number]),
            (f"after, J&F {after.scores[number]:.2f}", -1, after.masks[number]))]
    rights = [(found.materials == true).mean((1, 2)) for found in (before, after)]
    order = np.argsort(rights[1] - rights[0])
    for i in order[[3 * len(order) // 4, len(order) // 2, len(order) // 4]]:
        panels += [(name, tinted(unseen.images[MEMORY + i], ids, (320, 320)).crop((0, 0, 320, 240))) for name, ids in (
            ("image", 0 * true[i]), ("true materials", 1 + true[i]),
            (f"before, {rights[0][i]:.0%} right", 1 + before.materials[i]),
            (f"after, {rights[1][i]:.0%} right", 1 + after.materials[i]))]
    labelled_panels(panels, columns=4).save(folder / "before_after.png")
    scene = unseen.clips[0]
    write_clip(folder / "clip.gif", scene, {"true": scene.objects, "before training": before.masks[0],
                                            "after": after.masks[0]})


def write_clip(output: Path, scene: Scene, masks: dict[str, np.ndarray]) -> None:
    """Write a clip as a GIF, once for each set of masks [T, H, W], side by side below their names."""
    write_video((labelled_panels([(name, tinted(frame, found[t], (320, 240))) for name, found in masks.items()],
                                 columns=len(masks)) for t, frame in enumerate(scene.frames)), output, fps=6)


def report_losses(log: Path) -> None:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    print(f"\nlosses by epoch (a head that learns nothing stays at ln K = {math.log(PROTOTYPES):.2f}):")
    for row in rows:
        print(f"  epoch {row['epoch']}: image {row['train_clsloss']:.3f}, patch {row['train_patchloss']:.3f}")


def show(folder: Path, epochs: int, images: int, seed: int) -> None:
    """Run the whole demo in a folder."""
    start = time.time()
    make_images(folder / "scenes", images, seed)
    unseen = make_unseen(seed)
    before = measure(initial_backbone(seed), unseen)
    run(*pretraining(folder / "scenes", folder / "vit_pico", epochs, seed))
    after = measure(load_backbone(folder / "vit_pico"), unseen)
    report_losses(folder / "vit_pico" / "log.txt")
    report(before.figures, after.figures)
    draw(folder, unseen, before, after)
    (folder / "figures.json").write_text(json.dumps({"before": before.figures, "after": after.figures}))
    print(f"\nlook at {folder / 'before_after.png'}: true masks and materials beside those found before and after; and "
          f"at clip.gif, scenes (what was trained on) and vit_pico (log.txt, checkpoint.pth) there. "
          f"{time.time() - start:.0f} s in all")


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=user_path, default=Path("runs/demo"), help="where everything goes")
    parser.add_argument("--epochs", type=int, default=8, help="passes through the training images")
    parser.add_argument("--images", type=int, default=2000, help="scenes to train on")
    parser.add_argument("--seed", type=int, default=0, help="of all scenes, of the weights and of training")
    args = parser.parse_args()
    try:
        show(args.output_dir, args.epochs, args.images, args.seed)
    except subprocess.CalledProcessError as error:
        return error.returncode  # the job has printed why
    return 0


if __name__ == "__main__":
    run_main(main)
