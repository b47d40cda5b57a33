"""J & F of DAVIS 2017, semi-supervised: how well masks of a video agree with its annotation (Perazzi et al. 2016).

    python davis_metrics.py --davis_path /path/to/DAVIS --results_path /path/to/masks --task semi-supervised --set val

Options, figures and the two CSV files are those of the official davis2017-evaluation; unlike it, figures are
computed each time, never taken from CSV files that lie there.
"""
import argparse
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from davis_data import VOID, DataError, check_name, numbered_files, read_masks, read_set, write_text

MEASURES = ("J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")


def boundary_map(mask: np.ndarray) -> np.ndarray:
    """Boundary of a 0/1 mask, uint8 [H, W]: pixels unlike their right, lower or lower-right neighbour."""
    # so the largest and smallest of these four are not the same; past the edge there is nothing to differ from
    return cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((2, 2), np.uint8), anchor=(0, 0))


def to_bits(mask: np.ndarray, stride: int) -> int:
    """A 0/1 mask, uint8 [H, W], as a number whose bit y·stride + x is a pixel: moving the mask is shifting it."""
    rows = cv2.copyMakeBorder(mask, 0, 0, 0, stride - mask.shape[1], cv2.BORDER_CONSTANT)
    return int.from_bytes(np.packbits(rows, bitorder="little").tobytes(), "little")


def dilate(bits: int, stride: int, radius: int) -> int:
    """Pixels with a set one at x² + y² ≤ radius². stride is width + radius, so that no row runs into the next."""
    row, reach, dilated = bits, 0, 0
    for y in range(radius, -1, -1):  # the disk's rows grow wider towards its centre
        while (reach + 1) ** 2 + y**2 <= radius**2:
            reach += 1
            row |= bits << reach | bits >> reach
        dilated |= row << y * stride | row >> y * stride
    return dilated


def tolerance(shape: tuple[int, ...]) -> int:
    """How far apart boundaries of an H×W frame may lie and still agree, in pixels."""
    return math.ceil(0.008 * math.hypot(*shape))


def box(mask: np.ndarray, margin: int) -> tuple[slice, slice]:
    """Rows and columns of a 0/1 mask, uint8 [H, W], at most margin pixels from what is set; none if nothing is."""
    left, top, width, height = cv2.boundingRect(mask)
    if not width:
        return slice(0), slice(0)
    return slice(max(top - margin, 0), top + height + margin), slice(max(left - margin, 0), left + width + margin)


def jaccard(annotation: np.ndarray, result: np.ndarray) -> float:
    """Region similarity J: intersection over union of two 0/1 masks, uint8 [H, W]; 1 where both are empty."""
    union = cv2.countNonZero(annotation | result)
    return cv2.countNonZero(annotation & result) / union if union else 1.0


def boundary_f(annotation: np.ndarray, result: np.ndarray, radius: int | None = None) -> float:
    """Contour accuracy F of two 0/1 masks, uint8 [H, W]: boundary points that have the other's within radius.

    radius is the whole frame's tolerance when the masks are cut out of it; their own otherwise.
    """
    radius = tolerance(annotation.shape) if radius is None else radius
    wanted, found = boundary_map(annotation), boundary_map(result)
    n_wanted, n_found = cv2.countNonZero(wanted), cv2.countNonZero(found)
    if not n_wanted or not n_found:
        return float(n_wanted == n_found)
    where = box(wanted, radius)  # farther out nothing matches
    stride = wanted[where].shape[1] + radius
    wanted, found = to_bits(wanted[where], stride), to_bits(found[where], stride)
    precision = (found & dilate(wanted, stride, radius)).bit_count() / n_found
    recall = (wanted & dilate(found, stride, radius)).bit_count() / n_wanted
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def num_objects(annotation: np.ndarray) -> int:
    """Highest object id in the first frame's annotation, void left out."""
    return int(annotation[annotation != VOID].max(initial=0))


def score_frame(annotation: np.ndarray, result: np.ndarray, objects: int) -> tuple[list[float], list[float]]:
    """J and F of objects 1 … n in one frame; both masks are ids, uint8 [H, W]. Void is nobody's, so background."""
    radius = tolerance(annotation.shape)
    js, fs = [], []
    for i in range(1, objects + 1):
        pair = [(ids == i).view(np.uint8) for ids in (annotation, result)]
        where = box(pair[0] | pair[1], 1)  # where boundaries can be
        pair = [mask[where] for mask in pair]
        js.append(jaccard(*pair) if pair[0].size else 1.0)
        fs.append(boundary_f(*pair, radius) if pair[0].size else 1.0)
    return js, fs


def score_sequence(annotations: np.ndarray, results: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """J and F, [objects, T - 2], of all frames but the first and the last.

    Args:
        annotations, results: ids, uint8 [T, H, W].

    Raises:
        DataError: fewer than 3 frames, no object, other shapes, or an id that the first annotation does not have.
    """
    if annotations.shape != results.shape:
        raise DataError(f"results are {list(results.shape)}, annotations {list(annotations.shape)} (T, H, W)")
    if len(annotations) < 3:
        raise DataError(f"{len(annotations)} frames; the first and last are not scored, so at least 3 are needed")
    objects = num_objects(annotations[0])
    if not objects:
        raise DataError("the first annotation has no object")
    highest = int(results[1:-1].max())
    if highest > objects:
        raise DataError(f"results have id {highest}, the first annotation has {objects} objects")
    scores = [score_frame(a, r, objects) for a, r in zip(annotations[1:-1], results[1:-1], strict=True)]
    return np.array([j for j, _ in scores]).T, np.array([f for _, f in scores]).T


def statistics(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, recall and decay of one object's J or F over the evaluated frames."""
    ids = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    # neighbouring quarters share a frame, as in the official code
    decay = values[ids[0]:ids[1] + 1].mean() - values[ids[3]:ids[4] + 1].mean()
    return float(values.mean()), float((values > 0.5).mean()), float(decay)


def summarise(scores: dict[str, tuple[np.ndarray, np.ndarray]]) -> tuple[dict[str, float], dict[str, tuple]]:
    """Scores by sequence -> the seven official measures, and (J-Mean, F-Mean) by "<sequence>_<object>"."""
    if not scores:
        raise DataError("no sequence to score")
    j = np.array([statistics(values) for js, _ in scores.values() for values in js]).mean(0)
    f = np.array([statistics(values) for _, fs in scores.values() for values in fs]).mean(0)
    objects = {f"{name}_{i + 1}": (float(js[i].mean()), float(fs[i].mean()))
               for name, (js, fs) in scores.items() for i in range(len(js))}
    return dict(zip(MEASURES, map(float, ((j[0] + f[0]) / 2, *j, *f)), strict=True)), objects


def score_files(annotation_folder: Path, result_folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """J and F of one sequence from two folders of PNGs; the result's first and last frames need not be there."""
    cv2.setNumThreads(1)
    wanted = numbered_files(annotation_folder, (".png",), "annotations")
    found = [result_folder / path.name for path in wanted]
    if not result_folder.is_dir():
        raise DataError(f"{result_folder}: no results for this sequence")
    missing = [path.name for path in found[1:-1] if not path.is_file()]
    if missing:
        raise DataError(f"{result_folder}: lacks {len(missing)} of {len(found)} frames, {missing[0]} first")
    annotations = read_masks(wanted)
    results = np.zeros_like(annotations)
    if len(found) > 2:
        middle = read_masks(found[1:-1])
        if middle.shape[1:] != annotations.shape[1:]:
            raise DataError(f"{found[1]}: is {middle.shape[2]}×{middle.shape[1]}, "
                            f"its annotation {annotations.shape[2]}×{annotations.shape[1]}")
        results[1:-1] = middle
    try:
        return score_sequence(annotations, results)
    except DataError as error:
        raise DataError(f"{result_folder}: {error}") from None


def score_folder(davis_path: str | Path, results_path: str | Path, set_name: str = "val",
                 processes: int = 1) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """J and F by sequence for a folder of results, sequences shared out over processes.

    Raises:
        DataError: one line for every sequence that cannot be scored; nothing is scored without them.
    """
    names = read_set(davis_path, set_name)
    for name in names:
        check_name(name)
    folders = [(Path(davis_path) / "Annotations" / "480p" / n, Path(results_path) / n) for n in names]
    processes = min(processes, len(names))
    if processes == 1:
        outcomes = [attempt_score(pair) for pair in folders]
    else:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            outcomes = list(pool.map(attempt_score, folders))
    errors = [str(outcome) for outcome in outcomes if isinstance(outcome, DataError)]
    if errors:
        raise DataError("\n".join(errors))
    return dict(zip(names, outcomes, strict=True))


def attempt_score(folders: tuple[Path, Path]) -> tuple[np.ndarray, np.ndarray] | DataError:
    try:
        return score_files(*folders)
    except DataError as error:
        return error


def format_scores(scores: dict[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """The figures as text, the seven measures and then a line for each object."""
    measures, objects = summarise(scores)
    width = max(map(len, ["Sequence", *objects]))
    lines = ["  ".join(f"{m:>9}" for m in measures), "  ".join(f"{v:9.3f}" for v in measures.values()), "",
             f"{'Sequence':<{width}}  {'J-Mean':>7}  {'F-Mean':>7}"]
    return "\n".join(lines + [f"{name:<{width}}  {j:7.3f}  {f:7.3f}" for name, (j, f) in objects.items()])


def write_csv(scores: dict[str, tuple[np.ndarray, np.ndarray]], folder: str | Path, set_name: str = "val") -> None:
    """The official tool's two files: global_results-<set>.csv and per-sequence_results-<set>.csv."""
    measures, objects = summarise(scores)
    write_text(Path(folder) / f"global_results-{set_name}.csv",
               ",".join(measures) + "\n" + ",".join(f"{v:.3f}" for v in measures.values()) + "\n")
    write_text(Path(folder) / f"per-sequence_results-{set_name}.csv", "Sequence,J-Mean,F-Mean\n" + "".join(
        f"{name},{j:.3f},{f:.3f}\n" for name, (j, f) in objects.items()))


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="J & F of DAVIS 2017 (semi-supervised)")
    parser.add_argument("--davis_path", required=True, help="folder with ImageSets, JPEGImages and Annotations")
    parser.add_argument("--results_path", required=True,
                        help="folder of results, <sequence>/<frame>.png; the two CSV files are written there")
    parser.add_argument("--task", default="semi-supervised", choices=["semi-supervised"],
                        help="the unsupervised task is not scored here")
    parser.add_argument("--set", default="val", help="which list of ImageSets/2017 (default: val)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(),
                        help="sequences are shared out over them (default: one a core)")
    return parser


def main(args: argparse.Namespace) -> int:
    if not Path(args.results_path).is_dir():
        print(f"--results_path {args.results_path}: no such folder", file=sys.stderr)
        return 2
    if args.processes < 1:
        print(f"--processes {args.processes}: give 1 or more", file=sys.stderr)
        return 2
    try:
        scores = score_folder(args.davis_path, args.results_path, args.set, args.processes)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    print(format_scores(scores))
    write_csv(scores, args.results_path, args.set)
    return 0


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
