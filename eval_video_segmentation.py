"""DAVIS 2017: carry the first frame's labels through each video by the similarity of patches, and score the masks.

    python eval_video_segmentation.py --data_path /path/to/davis-2017/DAVIS/ --output_dir /path/to/saving_dir \
        --pretrained_weights /path/to/model_dir --arch vit_small --patch_size 16
    torchrun --nproc_per_node=4 eval_video_segmentation.py ...      # shares the videos out over GPUs or processes

Writes <output_dir>/<sequence>/<frame>.png, which davis_metrics.py and the official evaluator read, and prints J & F
where the annotations are there.
"""
import argparse
import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import davis_data
from checkpoints import load_backbone
from davis_data import SCALE_SIZE, VOID, DataError, Sequence, imwrite_indexed, load_frame, resized_shape
from davis_metrics import format_scores, score_sequence
from distributed import keep_freed_memory, pick_device
from label_propagation import label_propagation, norm_mask, propagate, restrict_neighborhood, to_mask, to_one_hot  # noqa: F401
from vision_transformer import ARCHS, VisionTransformer

MEAN = (0.485, 0.456, 0.406)
STD = (0.228, 0.224, 0.225)  # 0.228, not ImageNet's 0.229: the published protocol has it so
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---------------------------------------------------------------- frames and annotations

def normalise(frames: torch.Tensor) -> torch.Tensor:
    """RGB, uint8 [B, H, W, 3] -> what the backbone takes, float [B, 3, H, W]."""
    mean, std = (torch.tensor(values, device=frames.device) for values in (MEAN, STD))
    return ((frames / 255 - mean) / std).permute(0, 3, 1, 2)


def read_frame(path: str | Path, scale_size: int = SCALE_SIZE) -> tuple[torch.Tensor, int, int]:
    """A frame resized and normalised, [3, H, W], and its own height and width."""
    image, height, width = load_frame(path, scale_size)
    return normalise(torch.from_numpy(image)[None])[0], height, width


def read_seg(path: str | Path, patch_size: int, scale_size: int = SCALE_SIZE) -> tuple[torch.Tensor, np.ndarray]:
    """An annotation as labels of patches, [1, C, h, w], and as it is, uint8 [H, W]. Void becomes background."""
    annotation = davis_data.read_mask(path)[0]
    height, width = resized_shape(*annotation.shape, scale_size)
    labels = Image.fromarray(np.where(annotation == VOID, 0, annotation).astype(np.uint8))
    labels = labels.resize((width // patch_size, height // patch_size), Image.Resampling.NEAREST)
    return to_one_hot(torch.from_numpy(np.array(labels))), annotation


def annotation_notes(sequence: Sequence, labels: torch.Tensor, annotation: np.ndarray) -> Iterator[str]:
    """What a user should know of a first annotation [H, W] and of the labels [1, C, h, w] it is reduced to."""
    if (annotation == VOID).any():
        yield f"{sequence.annotation}: void ({VOID}) counts as background"
    objects = set(np.unique(annotation).tolist()) - {0, VOID}
    lost = sorted(objects - set(labels[0].flatten(1).any(1).nonzero()[:, 0].tolist()))
    if lost:
        rows, columns = labels.shape[2:]
        yield (f"{sequence.annotation}: object {', '.join(map(str, lost))} is too small for {rows}×{columns} patches, "
               "so no mask will show it")


# ---------------------------------------------------------------- features

class PatchFeatures:
    """Features of frames in batches, which are halved for good when memory runs out."""

    def __init__(self, model: VisionTransformer, device: torch.device, dtype: torch.dtype, batch_size: int):
        self.model, self.device, self.dtype, self.batch_size = model, device, dtype, batch_size

    def forward(self, frames: np.ndarray) -> torch.Tensor:
        images = normalise(torch.from_numpy(frames).to(self.device))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            features = self.model.get_intermediate_layers(images, 1)[0]  # without final norm, as published
        return F.normalize(features.float(), dim=-1).unflatten(1, self.model.grid_size(images))

    def __call__(self, frames: np.ndarray) -> torch.Tensor:
        """RGB, uint8 [B, H, W, 3] -> unit-length features, float32 [B, h, w, D]."""
        features, done = [], 0
        while done < len(frames):
            try:
                features.append(self.forward(frames[done:done + self.batch_size]))
                done += self.batch_size
                continue
            except RuntimeError as error:
                if not (isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in str(error)):
                    raise
            if self.batch_size == 1:
                raise DataError(f"out of memory with one frame of {frames.shape[2]}×{frames.shape[1]} at a time")
            self.batch_size //= 2
            torch.cuda.empty_cache()
            tqdm.write(f"out of memory: going on with --bs {self.batch_size}", file=sys.stderr)
        return torch.cat(features)


def ahead(executor: Executor, function: Callable, items: Iterable, depth: int) -> Iterator:
    """function(item) of every item in order, the next depth of them already under way in other threads."""
    waiting = deque()
    try:
        for item in items:
            waiting.append(executor.submit(function, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def frame_features(sequence: Sequence, extract: PatchFeatures, shape: tuple[int, int],
                   executor: Executor) -> Iterator[torch.Tensor]:
    """Features [h, w, D] of a video's frames, one by one."""
    batch, loaded = [], ahead(executor, load_frame, sequence.frames, 2 * extract.batch_size)
    for path, (image, height, width) in zip(sequence.frames, loaded, strict=True):
        if (height, width) != shape:
            raise DataError(f"{path}: is {width}×{height}, the first frame {shape[1]}×{shape[0]}")
        batch.append(image)
        if len(batch) >= extract.batch_size or path == sequence.frames[-1]:
            yield from extract(np.stack(batch))
            batch = []


# ---------------------------------------------------------------- videos

@torch.inference_mode()
def segment(sequence: Sequence, extract: PatchFeatures, args: argparse.Namespace, executor: Executor,
            progress: tqdm) -> np.ndarray:
    """Masks of a video, uint8 [T, H, W]; <output_dir>/<sequence> has them when all of them are there."""
    patch_size = extract.model.patch_size
    labels, annotation = read_seg(sequence.annotation, patch_size)
    for note in annotation_notes(sequence, labels, annotation):
        tqdm.write(note, file=sys.stderr)
    palette = davis_data.read_mask(sequence.annotation)[1]
    features = frame_features(sequence, extract, annotation.shape, executor)
    soft_labels = propagate(features, labels[0].to(extract.device), args.n_last_frames, args.size_mask_neighborhood,
                            args.topk)
    masks, writing = [annotation], []
    with davis_data.whole_folder(Path(args.output_dir) / sequence.name) as folder:
        for path in sequence.frames:
            if writing:
                masks.append(to_mask(next(soft_labels), patch_size, *annotation.shape).cpu().numpy())
            writing.append(executor.submit(imwrite_indexed, folder / f"{path.stem}.png", masks[-1], palette))
            progress.update()
        for future in writing:
            future.result()
    return np.stack(masks)


def score(sequence: Sequence, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """J and F [objects, T - 2] of a video's masks, uint8 [T, H, W]."""
    paths = sequence.annotations()
    if paths is None:
        raise DataError("not scored: some frames have no annotation")
    try:
        return score_sequence(davis_data.read_masks(paths), masks)
    except DataError as error:
        raise DataError(f"not scored: {error}") from None


def evaluate(sequences: list[Sequence], extract: PatchFeatures, args: argparse.Namespace,
             quiet: bool = False) -> tuple[dict, dict[str, str], dict[str, str]]:
    """Segment videos and score them: J and F, why some have no scores, why some failed; all by name."""
    scoring, scores, unscored, failed = {}, {}, {}, {}
    frames = sum(len(sequence.frames) for sequence in sequences)
    with ThreadPoolExecutor(4) as executor, tqdm(total=frames, unit="frame", disable=quiet) as progress:
        for sequence in sequences:
            progress.set_description(sequence.name)
            try:
                masks = segment(sequence, extract, args, executor, progress)
                if not args.no_score:
                    scoring[sequence.name] = executor.submit(score, sequence, masks)
            except (DataError, OSError) as error:
                failed[sequence.name] = str(error)
                tqdm.write(f"{sequence.name}: {error}", file=sys.stderr)
        for name, future in scoring.items():
            try:
                scores[name] = future.result()
            except DataError as error:
                unscored[name] = str(error)
    return scores, unscored, failed


# ---------------------------------------------------------------- the job

def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Video object segmentation on DAVIS 2017 by label propagation")
    parser.add_argument("--data_path", required=True, help="folder with ImageSets, JPEGImages and Annotations")
    parser.add_argument("--output_dir", default=".", help="where <sequence>/<frame>.png go")
    parser.add_argument("--no_score", action="store_true", help="leave J & F out")
    model = parser.add_argument_group("backbone")
    model.add_argument("--pretrained_weights", default="", help="checkpoint of any kind")
    model.add_argument("--checkpoint_key", default="teacher", help="network of a training run: teacher or student")
    model.add_argument("--arch", choices=list(ARCHS), help="the checkpoint's own; vit_small without one")
    model.add_argument("--patch_size", type=int, help="the checkpoint's own; 16 without one")
    model.add_argument("--random_weights", action="store_true", help="go on without a checkpoint, untrained")
    model.add_argument("--seed", type=int, default=0, help="of the random weights")
    protocol = parser.add_argument_group("protocol")
    protocol.add_argument("--n_last_frames", type=int, default=7, help="context frames besides the first one")
    protocol.add_argument("--size_mask_neighborhood", type=int, default=12,
                          help="patches look at contexts in a window of ± so many patches; 0: everywhere")
    protocol.add_argument("--topk", type=int, default=5, help="how many context patches a label is taken from")
    speed = parser.add_argument_group("speed")
    speed.add_argument("--bs", type=int, default=6, help="frames at a time; halved by itself when memory runs out")
    speed.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; auto takes the GPU if any")
    speed.add_argument("--precision", default="auto", choices=["auto", *DTYPES],
                       help="of the backbone; auto: bf16 on a GPU that has it, otherwise fp32. The propagation is "
                            "always fp32; fp16 can overflow in large backbones")
    return parser


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return DTYPES[precision]


def check_options(args: argparse.Namespace) -> None:
    for name, least in (("n_last_frames", 0), ("size_mask_neighborhood", 0), ("topk", 1), ("bs", 1),
                        ("patch_size", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise DataError(f"--{name} {value}: give {least} or more")
    output, data = Path(args.output_dir).resolve(), Path(args.data_path).resolve()
    if any(folder in (output, *output.parents) for folder in (data / "JPEGImages", data / "Annotations")):
        raise DataError(f"--output_dir {args.output_dir}: lies among the data, which results would replace")


def find_sequences(args: argparse.Namespace) -> tuple[list[Sequence], dict[str, str]]:
    """The videos of val.txt that can be segmented, and why the others cannot."""
    sequences, failed = [], {}
    for name in davis_data.read_set(args.data_path):
        folder = Path(args.output_dir) / name
        try:
            sequence = davis_data.find_sequence(args.data_path, name)
            others = [p.name for p in folder.glob("*") if p.suffix != ".png"] if folder.is_dir() else []
            if others or folder.is_file():
                raise DataError(f"{folder}: not replaced, as it is no folder of masks ({', '.join(others[:1])})")
            sequences.append(sequence)
        except DataError as error:
            failed[name] = str(error)
    return sequences, failed


def share(sequences: list[Sequence], rank: int, world_size: int) -> list[Sequence]:
    """This process's sequences; each, from the longest on, goes to the process with the fewest frames so far."""
    shares = [[] for _ in range(world_size)]
    for sequence in sorted(sequences, key=lambda s: -len(s.frames)):
        min(shares, key=lambda one: sum(len(s.frames) for s in one)).append(sequence)
    return sorted(shares[rank], key=sequences.index)


def report(names: list[str], scores: dict, unscored: dict[str, str], failed: dict[str, str]) -> int:
    """Print what came out, in the order of val.txt, and return the exit status."""
    if scores:
        print(f"J & F of {len(scores)} of {len(names)} sequences")
        print(format_scores({name: scores[name] for name in names if name in scores}))
    for name in unscored:
        print(f"{name}: {unscored[name]}")
    for name in failed:
        print(f"failed: {name}: {failed[name]}", file=sys.stderr)
    return 1 if failed else 0


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, or 1 if a sequence failed. What lets no sequence be segmented raises a ValueError."""
    rank, local_rank, world_size = (int(os.environ.get(name, default)) for name, default in
                                    (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    check_options(args)
    names = davis_data.read_set(args.data_path)
    sequences, failed = find_sequences(args)
    # an Apple GPU only where it is asked for, as it is untested; more processes than GPUs share them
    name = "cpu" if args.device == "auto" and not torch.cuda.is_available() else args.device
    device = pick_device(name, local_rank % max(torch.cuda.device_count(), 1))
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(args.seed)
    with contextlib.redirect_stdout(sys.stdout if rank == 0 else None):
        model = load_backbone(args.pretrained_weights, args.checkpoint_key, args.arch, args.patch_size,
                              args.random_weights).to(device)
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--output_dir {args.output_dir}: {error.strerror}") from None
    if rank == 0:
        for name, error in failed.items():
            print(f"{name}: {error}", file=sys.stderr)
        replaced = [s.name for s in sequences if (Path(args.output_dir) / s.name).exists()]
        if replaced:
            print(f"replacing the masks of {', '.join(replaced)} in {args.output_dir}")
    if world_size > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=1))  # only scores are exchanged, once, at the end
    extract = PatchFeatures(model, device, pick_dtype(args.precision, device), args.bs)
    outcome = evaluate(share(sequences, rank, world_size), extract, args, quiet=rank > 0)
    outcomes = [outcome]
    if world_size > 1:
        outcomes = [None] * world_size
        dist.all_gather_object(outcomes, outcome)
        dist.destroy_process_group()
    scores, unscored, failures = ({k: v for part in parts for k, v in part.items()}
                                  for parts in zip(*outcomes, strict=True))
    return report(names, scores, unscored, failed | failures) if rank == 0 else 0


def main(args: argparse.Namespace) -> int:
    try:
        return run(args)
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"eval_video_segmentation.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
