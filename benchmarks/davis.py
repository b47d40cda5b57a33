"""Seconds per frame of DAVIS evaluation, by stage, beside a plain implementation.

    python benchmarks/davis.py                                         # ViT-S/16, 50 frames of 854×480
    python benchmarks/davis.py --device cuda --precision bf16 --patch_size 8 --no_plain
    python benchmarks/davis.py --data_path /path/to/DAVIS --sequence blackswan --pretrained_weights checkpoint.pth

The plain implementation takes one frame at a time, computes each block's attention matrix explicitly as the published
backbone does, fills the window mask in loops, computes the affinity of all patches with all context patches before it
zeroes all but the topk, and scores with whole-frame formulas. Without --data_path a clip is drawn: textured objects on
a moving texture. Only the time of propagation depends on the features: the fewer directions they span, the fewer
patches are compared.
"""
import argparse
import copy
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval_video_segmentation as job
from selfpatch.checkpoints.loading import load_backbone
from selfpatch.distributed.precision import autocast, choose_dtype
from selfpatch.distributed.processes import keep_freed_memory, pick_device
from selfpatch.errors import run_main
from selfpatch.evaluation.model_options import add_device_options
from selfpatch.method.vision_transformer import ARCHS
from selfpatch.video import davis as davis_data
from selfpatch.video import scores as davis_metrics
from selfpatch.video.label_propagation import to_mask
from selfpatch.video.propagation_bounds import propagate

HEIGHT, WIDTH = 480, 854
OBJECTS = ((200, 150, 6, 2, 90), (620, 300, -5, -1, 110), (420, 380, 2, -3, 40))  # x, y, their speeds, size


# ---------------------------------------------------------------- a clip

def make_clip(folder: Path, frames: int) -> davis_data.Sequence:
    """Write a DAVIS folder with one sequence: three textured ellipses drifting over a panning texture."""
    rng = np.random.RandomState(0)
    textures = [cv2.resize(rng.randint(0, 256, (40, 60, 3), np.uint8), (2 * WIDTH, 2 * HEIGHT),
                           interpolation=cv2.INTER_CUBIC) for _ in range(4)]
    images, masks = (folder / kind / "480p" / "clip" for kind in ("JPEGImages", "Annotations"))
    for path in (images, masks, folder / "ImageSets" / "2017"):
        path.mkdir(parents=True)
    (folder / "ImageSets" / "2017" / "val.txt").write_text("clip\n")
    for t in range(frames):
        frame, mask = textures[0][t:t + HEIGHT, 3 * t:3 * t + WIDTH].copy(), np.zeros((HEIGHT, WIDTH), np.uint8)
        for i, (x, y, dx, dy, size) in enumerate(OBJECTS):
            shape = np.zeros_like(mask)
            cv2.ellipse(shape, (x + dx * t, y + dy * t), (size, 2 * size // 3), 2 * t, 0, 360, 1, -1)
            frame[shape > 0], mask[shape > 0] = textures[i + 1][:HEIGHT, :WIDTH][shape > 0], i + 1
        cv2.imwrite(str(images / f"{t:05d}.jpg"), frame)
        davis_data.imwrite_indexed(masks / f"{t:05d}.png", mask)
    return davis_data.find_sequence(folder, "clip")


def find_clip(args: argparse.Namespace) -> davis_data.Sequence:
    """The first frames of a DAVIS sequence."""
    sequence = davis_data.find_sequence(args.data_path, args.sequence or davis_data.read_set(args.data_path)[0])
    shape = sequence.mask.ids.shape
    if shape != (HEIGHT, WIDTH) or sequence.annotations() is None:
        raise davis_data.DataError(f"{sequence.annotation.parent}: should have {WIDTH}×{HEIGHT} masks of all frames")
    return replace(sequence, frames=sequence.frames[:args.frames])


# ---------------------------------------------------------------- plain implementation

def plain_window(height: int, width: int, radius: int) -> torch.Tensor:
    window = torch.zeros(height, width, height, width)
    for y in range(height):
        for x in range(width):
            for v in range(max(0, y - radius), min(height, y + radius + 1)):
                for u in range(max(0, x - radius), min(width, x + radius + 1)):
                    window[y, x, v, u] = 1
    return window.view(height * width, height * width)


def plain_propagation(features: torch.Tensor, labels: torch.Tensor, n_last: int, radius: int, topk: int) -> list:
    """Raw features [T, h, w, D], first labels [C, h, w] -> soft labels [C, h, w] of each later frame."""
    height, width = features.shape[1:3]
    window = plain_window(height, width, radius).to(features.device)
    features, done = features.flatten(1, 2).transpose(1, 2).contiguous(), [labels.flatten(1)]  # [T, D, N]
    for t in range(1, len(features)):
        contexts = [0, *range(max(1, t - n_last), t)]
        sources = F.normalize(features[contexts], dim=1)
        target = F.normalize(features[t], dim=0).T.expand(len(contexts), -1, -1)
        affinity = torch.exp(torch.bmm(target, sources) / 0.1) * window
        affinity = affinity.transpose(1, 2).reshape(-1, height * width)  # contexts down, targets across, as published
        kth = affinity.topk(topk, dim=0).values[-1]
        affinity[affinity < kth] = 0
        affinity = affinity / affinity.sum(0)
        done.append(torch.cat([done[i] for i in contexts], dim=1) @ affinity)
    return [label.view(-1, height, width) for label in done[1:]]


def plain_mask(labels: torch.Tensor, patch_size: int) -> np.ndarray:
    up = F.interpolate(labels[None], scale_factor=patch_size, mode="bilinear", align_corners=False)[0]
    for channel in up:
        if channel.max() > 0:
            channel -= channel.min()
            channel /= channel.max()
    ids = up.max(0).indices.to(torch.uint8).cpu().numpy()
    return np.array(Image.fromarray(ids).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST))


def plain_boundary(mask: np.ndarray) -> np.ndarray:
    right, lower, corner = (np.zeros_like(mask) for _ in range(3))
    right[:, :-1], lower[:-1], corner[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
    boundary = (mask ^ right) | (mask ^ lower) | (mask ^ corner)
    boundary[-1] = mask[-1] ^ right[-1]
    boundary[:, -1] = mask[:, -1] ^ lower[:, -1]
    boundary[-1, -1] = False
    return boundary


def plain_scores(annotations: np.ndarray, results: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    objects, radius = int(annotations[0].max()), davis_metrics.tolerance((HEIGHT, WIDTH))
    square = np.arange(-radius, radius + 1) ** 2
    near = (square[:, None] + square <= radius**2).astype(np.uint8)
    js, fs = np.zeros((2, objects, len(results) - 2))
    for i in range(objects):
        for t, (a, r) in enumerate(zip(annotations[1:-1] == i + 1, results[1:-1] == i + 1, strict=True)):
            union = np.sum(a | r)
            js[i, t] = np.sum(a & r) / union if union else 1
            wanted, found = plain_boundary(a), plain_boundary(r)
            matched = found & (cv2.dilate(wanted.astype(np.uint8), near) > 0)
            recalled = wanted & (cv2.dilate(found.astype(np.uint8), near) > 0)
            if np.sum(wanted) and np.sum(found):
                p, q = np.sum(matched) / np.sum(found), np.sum(recalled) / np.sum(wanted)
                fs[i, t] = 2 * p * q / (p + q) if p + q else 0
            else:
                fs[i, t] = float(np.sum(wanted) == np.sum(found))
    return js, fs


# ---------------------------------------------------------------- timing

class Clock:
    """Measures seconds by stage, waiting for the device before each reading."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}

    def __call__(self, stage: str, function, *args):
        self.wait()
        start = time.perf_counter()
        result = function(*args)
        self.wait()
        self.seconds[stage] = self.seconds.get(stage, 0) + time.perf_counter() - start
        return result

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def time_ours(sequence, extract, args, folder: Path) -> tuple[dict, np.ndarray]:
    clock, patch_size = Clock(extract.device), extract.model.patch_size
    frames = clock("reading", lambda: np.stack([davis_data.load_frame(path)[0] for path in sequence.frames]))
    features = clock("features", lambda: torch.cat([extract(frames[i:i + args.bs])
                                                    for i in range(0, len(frames), args.bs)]))
    labels, annotation = job.read_seg(sequence.annotation, patch_size)
    soft = clock("propagation", lambda: list(propagate(features, labels[0].to(extract.device))))
    masks = clock("masks", lambda: [to_mask(s, patch_size, HEIGHT, WIDTH).cpu().numpy() for s in soft])
    clock("writing", lambda: [davis_data.imwrite_indexed(folder / f"{i}.png", m) for i, m in enumerate(masks)])
    masks, annotations = np.stack([annotation, *masks]), davis_data.read_masks(sequence.annotations())
    clock("scoring", davis_metrics.score_sequence, annotations, masks)
    with ThreadPoolExecutor(4) as executor:
        clock("end to end", job.segment, sequence, extract, folder, executor)
    return clock.seconds, masks


def time_plain(sequence, extract, args, folder: Path) -> tuple[dict, np.ndarray]:
    model, clock = copy.deepcopy(extract.model), Clock(extract.device)
    for block in model.blocks:
        block.attn.fused_attn = False
    images = clock("reading", lambda: [job.read_frame(path)[0] for path in sequence.frames])

    def one(image):
        with autocast(extract.device, extract.dtype):
            return model(image[None].to(extract.device))[0].float()

    features = clock("features", lambda: torch.stack([one(image) for image in tqdm(images, "plain", leave=False)]))
    labels, annotation = job.read_seg(sequence.annotation, model.patch_size)
    features = features.unflatten(1, labels.shape[2:])
    soft = clock("propagation", plain_propagation, features, labels[0].to(extract.device), args.n_last_frames,
                 args.size_mask_neighborhood, args.topk)
    masks = clock("masks", lambda: [plain_mask(s, model.patch_size) for s in soft])
    clock("writing", lambda: [davis_data.imwrite_indexed(folder / f"{i}.png", m) for i, m in enumerate(masks)])
    clock.seconds["end to end"] = sum(clock.seconds.values())  # the stages run in sequence
    masks, annotations = np.stack([annotation, *masks]), davis_data.read_masks(sequence.annotations())
    clock("scoring", plain_scores, annotations, masks)
    return clock.seconds, masks


def main(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    dtype = choose_dtype(args.precision, device)
    if device.type == "cpu":
        keep_freed_memory()  # as the job does; both implementations benefit
    torch.manual_seed(0)
    model = load_backbone(args.pretrained_weights, arch=args.arch, patch_size=args.patch_size,
                          random_weights=not args.pretrained_weights).to(device)
    extract = job.FrameFeatures(model, device, dtype, args.bs)
    options = job.get_args_parser().parse_args(["--data_path", "", "--bs", str(args.bs)])
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        sequence = find_clip(args) if args.data_path else make_clip(Path(folder) / "davis", args.frames)
        frames = len(sequence.frames)
        print(f"{frames} frames of {WIDTH}×{HEIGHT}, patch size {model.patch_size}, {model.embed_dim} features, "
              f"{device}, {dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
              f"load {os.getloadavg()[0]:.1f}")
        extract(np.zeros((args.bs, 480, 832, 3), np.uint8))  # warm-up
        ours, masks = time_ours(sequence, extract, options, Path(folder))
        plain, plain_masks = ({}, masks) if args.no_plain else time_plain(sequence, extract, options, Path(folder))
    print("seconds per frame   here     plain     times")
    for stage, seconds in ours.items():
        there = plain.get(stage)
        compared = f"  {there / frames:8.4f}  {there / seconds:7.1f}×" if there else ""
        print(f"{stage:<14}  {seconds / frames:8.4f}{compared}")
    print(f"end to end: {ours['end to end']:.1f} s for the video" +
          (f"; {(masks == plain_masks).mean():.4%} of the pixels as in the plain way" if plain else ""))
    if device.type == "cuda":
        print(f"peak GPU memory: {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Seconds per frame of DAVIS evaluation, stage by stage")
    parser.add_argument("--arch", choices=list(ARCHS), help="default: the checkpoint's own; vit_small without one")
    parser.add_argument("--patch_size", type=int, help="default: the checkpoint's own; 16 without one")
    parser.add_argument("--pretrained_weights", type=os.path.expanduser, default="",
                        help="checkpoint of any kind; random weights without one")
    parser.add_argument("--data_path", type=os.path.expanduser, help="DAVIS, to take a clip of 854×480 from")
    parser.add_argument("--sequence", help="its name in val.txt; the first without it")
    parser.add_argument("--frames", type=int, default=50, help="of the clip, at most")
    parser.add_argument("--bs", type=int, default=6)
    add_device_options(parser)
    parser.add_argument("--no_plain", action="store_true", help="do not time the plain way")
    options = parser.parse_args()
    if options.sequence and not options.data_path:
        parser.error(f"--sequence {options.sequence}: give --data_path too")
    run_main(main, options)
