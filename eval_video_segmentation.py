"""DAVIS 2017: propagate the first frame's labels through each video by the similarity of patches, and score the masks.

    python eval_video_segmentation.py --data_path /path/to/davis-2017/DAVIS/ --output_dir /path/to/saving_dir \
        --pretrained_weights /path/to/model_dir --arch vit_small --patch_size 16
    torchrun --nproc_per_node=4 eval_video_segmentation.py ...      # shares the videos among GPUs or processes

Writes <output_dir>/<sequence>/<frame>.png, which davis_metrics.py and the official evaluator read, and prints J & F
if the annotations are there.
"""
import argparse
import contextlib
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from selfpatch.checkpoints.backbones import check_layer
from selfpatch.checkpoints.loading import load_backbone
from selfpatch.checkpoints.published import resolve_path
from selfpatch.data.files import is_hidden
from selfpatch.data.normalisation import normalise
from selfpatch.distributed.precision import choose_dtype
from selfpatch.distributed.processes import (
    Process,
    gather_objects,
    join,
    keep_freed_memory,
    leave_processes,
    pick_device,
    read_launcher,
)
from selfpatch.errors import POSITIVE_INT, ArgumentParser, ConfigError, Number, run_main, user_path
from selfpatch.evaluation.model_options import add_device_options, add_model_options
from selfpatch.video import davis as davis_data
from selfpatch.video.davis import SCALE_SIZE, VOID, DataError, Sequence, imwrite_indexed, load_frame, resized_shape
from selfpatch.video.frame_features import MEAN, STD, FrameFeatures, frame_features
from selfpatch.video.label_propagation import (  # noqa: F401 (some are here under DINO's names for other projects)
    label_propagation,
    norm_mask,
    restrict_neighborhood,
    to_mask,
    to_one_hot,
)
from selfpatch.video.propagation_bounds import propagate
from selfpatch.video.scores import absence_note, find_absent, format_scores, num_objects, score_sequence
from selfpatch.video.unfinished import Unfinished
from selfpatch.whole_files import whole_folder

# ---------------------------------------------------------------- frames and annotations

def read_frame(path: str | Path, scale_size: int = SCALE_SIZE) -> tuple[torch.Tensor, int, int]:
    """Read a frame: resized and normalised, [3, H, W], and its original height and width."""
    image, height, width, _ = load_frame(path, scale_size)
    return normalise(torch.from_numpy(image).permute(2, 0, 1), (MEAN, STD)), height, width


def read_seg(path: str | Path, patch_size: int, scale_size: int = SCALE_SIZE) -> tuple[torch.Tensor, np.ndarray]:
    """Read an annotation: one-hot labels of patches [1, C, h, w], and ids as stored, uint8 [H, W]."""
    annotation = davis_data.read_mask(path).ids
    return to_labels(annotation, patch_size, scale_size), annotation


def to_labels(annotation: np.ndarray, patch_size: int, scale_size: int = SCALE_SIZE) -> torch.Tensor:
    """Reduce ids, uint8 [H, W], to one-hot labels of patches [1, C, h, w]; void becomes background."""
    height, width = resized_shape(*annotation.shape, scale_size)
    labels = Image.fromarray(np.where(annotation == VOID, 0, annotation).astype(np.uint8))
    labels = labels.resize((width // patch_size, height // patch_size), Image.Resampling.NEAREST)
    return to_one_hot(torch.from_numpy(np.array(labels)))


def annotation_notes(sequence: Sequence, labels: torch.Tensor) -> Iterator[str]:
    """Notes for the user on a first annotation and its labels of patches [1, C, h, w]."""
    annotation = sequence.mask.ids
    yield from filter(None, (davis_data.orientation_note(sequence.annotation, sequence.mask.orientation),
                             davis_data.binary_note(sequence.annotation, sequence.mask)))
    if (annotation == VOID).any():
        yield f"{sequence.annotation}: void ({VOID}) counts as background"
    objects = set(np.unique(annotation).tolist()) - {0, VOID}
    missing = sorted(objects - set(labels[0].flatten(1).any(1).nonzero()[:, 0].tolist()))
    if missing:
        rows, columns = labels.shape[2:]
        yield (f"{sequence.annotation}: object {', '.join(map(str, missing))} is too small for {rows}×{columns} "
               "patches, so no mask will show it")


# ---------------------------------------------------------------- videos

@torch.inference_mode()
def segment(sequence: Sequence, extract: FrameFeatures, output_dir: str | Path, executor: Executor | None = None,
            progress: tqdm | None = None, **protocol: int) -> np.ndarray:
    """Segment a video, and write all of its masks or none to <output_dir>/<sequence>.

    Args:
        executor: threads that read frames and write masks; default: four.
        protocol: n_last_frames, size_mask_neighborhood and topk (see video.propagation_bounds.propagate).

    Returns:
        Masks, uint8 [T, H, W].

    Raises:
        ConfigError: a frame cannot be read, the annotation has no object, or memory runs out.
    """
    if executor is None:
        with ThreadPoolExecutor(4) as executor:
            return segment(sequence, extract, output_dir, executor, progress, **protocol)
    patch_size, annotation = extract.model.patch_size, sequence.mask.ids
    labels = to_labels(annotation, patch_size)
    if not num_objects(annotation):
        raise DataError(f"{sequence.annotation}: has no object, so there is nothing to segment")
    for note in annotation_notes(sequence, labels):
        tqdm.write(note, file=sys.stderr)
    features = frame_features(sequence, extract, annotation.shape, executor)
    soft_labels = propagate(features, labels[0].to(extract.device), **protocol)
    masks, writes = [annotation], []
    with whole_folder(Path(output_dir) / sequence.name) as folder:
        for path in sequence.frames:
            if writes:
                masks.append(to_mask(next(soft_labels), patch_size, *annotation.shape).cpu().numpy())
            writes.append(executor.submit(imwrite_indexed, folder / f"{path.stem}.png", masks[-1],
                                          sequence.mask.palette))
            if progress:
                progress.update()
        for future in writes:
            future.result()
    return np.stack(masks)


def score(sequence: Sequence, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """J and F [objects, T - 2] of masks, uint8 [T, H, W], of a video whose frames all have an annotation.

    Raises:
        DataError: an annotation cannot be read or has another size, or there are fewer than 3 frames.
    """
    try:
        annotations = davis_data.read_masks(sequence.annotations(), sequence.mask)
        if sequence.lacks_end():  # repeat the last frame, so that it is scored, as davis_metrics.py does
            annotations, masks = (np.concatenate([one, one[-1:]]) for one in (annotations, masks))
        return score_sequence(annotations, masks)
    except ConfigError as error:
        raise DataError(f"segmented, but not scored: {error}") from None


def evaluate(sequences: list[Sequence], extract: FrameFeatures, output_dir: str | Path, with_scores: bool = True,
             quiet: bool = False, unfinished: Unfinished | None = None,
             **protocol: int) -> tuple[dict, dict[str, str], dict[str, str]]:
    """Segment and score videos.

    Args:
        unfinished: an interrupted run, whose finished videos are kept.
        protocol: n_last_frames, size_mask_neighborhood and topk of segment.

    Returns:
        By name: J and F; why a video has no scores; why a video failed.
    """
    scoring, scores, unscored, failed = {}, {}, {}, {}
    frames = sum(len(sequence.frames) for sequence in sequences)
    with ThreadPoolExecutor(4) as executor, tqdm(total=frames, unit="frame", disable=quiet) as progress:
        for sequence in sequences:
            progress.set_description(sequence.name)
            try:
                masks = unfinished.masks(sequence) if unfinished else None
                if masks is None:
                    masks = segment(sequence, extract, output_dir, executor, progress, **protocol)
                else:
                    tqdm.write(f"{sequence.name}: kept from the call before, which was interrupted", file=sys.stderr)
                    progress.update(len(masks))
                if with_scores and sequence.annotations() is None:
                    unscored[sequence.name] = "not scored: some frames have no annotation"
                elif with_scores:
                    scoring[sequence.name] = executor.submit(score, sequence, masks)
            except (ConfigError, OSError) as error:
                failed[sequence.name] = str(error)
                tqdm.write(f"{sequence.name}: {error}", file=sys.stderr)
        for name, future in scoring.items():
            try:
                scores[name] = future.result()
            except ConfigError as error:
                failed[name] = str(error)
    return scores, unscored, failed


# ---------------------------------------------------------------- the job

def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Video object segmentation on DAVIS 2017 by label propagation")
    parser.add_argument("--data_path", required=True, type=user_path,
                        help="folder with ImageSets, JPEGImages and Annotations")
    parser.add_argument("--output_dir", default=".", type=user_path, help="where <sequence>/<frame>.png are written")
    parser.add_argument("--no_score", action="store_true", help="do not compute J & F")
    parser.add_argument("--present_objects", action="store_true",
                        help="leave ids without a pixel in the first annotation out of J & F; the official figures "
                             "count them as perfect")
    parser.add_argument("--allow_gaps", action="store_true",
                        help="segment videos in which frames are missing as if the others were consecutive")
    model = parser.add_argument_group("backbone")
    add_model_options(model)
    model.add_argument("--seed", type=Number(int, 0), default=0, help="seed of the random weights")
    protocol = parser.add_argument_group("protocol")
    protocol.add_argument("--n_last_frames", type=Number(int, 0), default=7,
                          help="context frames in addition to the first one")
    protocol.add_argument("--size_mask_neighborhood", type=Number(int, 0), default=12,
                          help="patches are compared in a window of ± this many patches; 0: with all patches")
    protocol.add_argument("--topk", type=POSITIVE_INT, default=5,
                          help="number of context patches a label is taken from")
    speed = parser.add_argument_group("speed")
    speed.add_argument("--bs", type=POSITIVE_INT, default=6, help="frames per batch; halved when memory runs out")
    add_device_options(speed, ". Labels are always propagated in fp32; fp16 can overflow in large backbones")
    return parser


def check_options(args: argparse.Namespace) -> None:
    output, data = Path(args.output_dir).resolve(), Path(args.data_path).resolve()
    if any(folder in (output, *output.parents) for folder in (data / "JPEGImages", data / "Annotations")):
        raise DataError(f"--output_dir {args.output_dir}: lies inside the data, which the results would overwrite")


def find_sequences(data_path: str | Path, output_dir: str | Path,
                   allow_gaps: bool = False) -> tuple[list[Sequence], dict[str, str]]:
    """Find the videos of val.txt that can be segmented, and say why the others cannot, by name."""
    sequences, failed = [], {}
    for name in davis_data.read_set(data_path):
        folder = Path(output_dir) / name
        try:
            sequence = davis_data.find_sequence(data_path, name, allow_gaps)
            others = [p.name for p in folder.glob("*") if p.suffix != ".png" and not is_hidden(p.name)]
            if others or folder.is_file():
                raise DataError(f"{folder}: not replaced, as it is not a folder of masks ({', '.join(others[:1])})")
            sequences.append(sequence)
        except (ConfigError, OSError) as error:
            failed[name] = str(error)
    return sequences, failed


def share(sequences: list[Sequence], rank: int, world_size: int) -> list[Sequence]:
    """Share of one process: longest first, each sequence goes to the process with the fewest frames so far."""
    shares = [[] for _ in range(world_size)]
    for sequence in sorted(sequences, key=lambda s: -len(s.frames)):
        min(shares, key=lambda one: sum(len(s.frames) for s in one)).append(sequence)
    return sorted(shares[rank], key=sequences.index)


def report_scores(sequences: list[Sequence], names: list[str], scores: dict, unscored: dict[str, str],
                  failed: dict[str, str], present_objects: bool) -> int:
    """Print the scores in the order of val.txt, then what is not scored or failed; return the exit status."""
    if scores:
        scores = {name: scores[name] for name in names if name in scores}
        absent = find_absent({s.name: s.mask.ids for s in sequences if s.name in scores})
        if absent:
            print(absence_note(scores, absent, present_objects), file=sys.stderr)
        print(f"J & F of {len(scores)} of {len(names)} sequences")
        print(format_scores(scores, absent, present_objects))
    for name in unscored:
        print(f"{name}: {unscored[name]}")
    for name in failed:
        print(f"failed: {name}: {failed[name]}", file=sys.stderr)
    return 1 if failed else 0


def settings(args: argparse.Namespace) -> dict:
    """Everything that determines the masks: the options, and the size and time of the checkpoint."""
    irrelevant = ("no_score", "present_objects", "output_dir", "bs")
    status = resolve_path(args.pretrained_weights).stat() if args.pretrained_weights else None
    file = [status.st_size, status.st_mtime_ns] if status else []
    return {name: value for name, value in vars(args).items() if name not in irrelevant} | {"file": file}


def make_extractor(args: argparse.Namespace, process: Process) -> FrameFeatures:
    """Load the backbone to this process's device; rank 0 prints what was loaded."""
    # auto never selects an Apple GPU, which is untested; processes share GPUs if there are more of them
    name = "cpu" if args.device == "auto" and not torch.cuda.is_available() else args.device
    device = pick_device(name, process.local_rank % max(torch.cuda.device_count(), 1))
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(args.seed)
    with contextlib.redirect_stdout(sys.stdout if process.rank == 0 else None):
        model = load_backbone(args.pretrained_weights, args.checkpoint_key, args.arch, args.patch_size,
                              args.random_weights).to(device)
    check_layer(model, args.layer)
    return FrameFeatures(model, device, choose_dtype(args.precision, device), args.bs, args.layer)


def main(args: argparse.Namespace) -> int:
    """Segment and score the videos. If none can be segmented, no backbone is loaded.

    Returns:
        The exit status: 0, or 1 if a video failed.

    Raises:
        ConfigError: an option, the list of sequences or the checkpoint cannot be used.
    """
    get_args_parser().check(vars(args))
    process = read_launcher()
    rank, world_size = process.rank, process.world_size
    check_options(args)
    names = davis_data.read_set(args.data_path)
    sequences, failed = find_sequences(args.data_path, args.output_dir, args.allow_gaps)
    if not sequences:  # the same in every process
        return report_scores([], names, {}, {}, failed, args.present_objects) if rank == 0 else 0
    extract = make_extractor(args, process)
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--output_dir {args.output_dir}: {error.strerror}") from None
    unfinished = Unfinished(args.output_dir, settings(args))
    if rank == 0:
        for name, error in failed.items():
            print(f"{name}: {error}", file=sys.stderr)
        replaced = [s.name for s in sequences if (Path(args.output_dir) / s.name).exists()]
        if replaced and not unfinished.continues():
            print(f"replacing the masks of {', '.join(replaced)} in {args.output_dir}")
        unfinished.begin()
    # the processes communicate once, at the end, to gather the scores
    join(process, "gloo", timeout=timedelta(days=1), option="")
    outcome = evaluate(share(sequences, rank, world_size), extract, args.output_dir, not args.no_score,
                       quiet=rank > 0, unfinished=unfinished, n_last_frames=args.n_last_frames,
                       size_mask_neighborhood=args.size_mask_neighborhood, topk=args.topk)
    scores, unscored, failures = ({k: v for part in parts for k, v in part.items()}
                                  for parts in zip(*gather_objects(outcome), strict=True))
    if world_size > 1:
        leave_processes()
    if rank:
        return 0
    unfinished.end()
    return report_scores(sequences, names, scores, unscored, failed | failures, args.present_objects)


if __name__ == "__main__":
    run_main(main, get_args_parser())
