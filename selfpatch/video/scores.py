"""J & F of DAVIS 2017, semi-supervised: region and contour agreement of masks and annotations (Perazzi et al. 2016)."""
import math
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from selfpatch.errors import ConfigError, check_may_start
from selfpatch.video.davis import (
    VOID,
    DataError,
    Mask,
    binary_note,
    check_name,
    numbered_files,
    read_mask,
    read_masks,
    read_set,
    write_text,
)

MEASURES = ("J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")


def boundary_map(mask: np.ndarray) -> np.ndarray:
    """Boundary of a 0/1 mask, uint8 [H, W]: pixels that differ from their right, lower or lower-right neighbour."""
    # equivalently, the maximum and minimum of these four differ; outside the frame nothing differs
    return cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((2, 2), np.uint8), anchor=(0, 0))


def to_bits(mask: np.ndarray, stride: int) -> int:
    """Pack a 0/1 mask, uint8 [H, W], into an integer: pixel (y, x) is bit y·stride + x, and a bit shift moves the mask.

    An operation on Python's big integers handles all pixels at once, 64 per machine word.
    """
    rows = cv2.copyMakeBorder(mask, 0, 0, 0, stride - mask.shape[1], cv2.BORDER_CONSTANT)
    return int.from_bytes(np.packbits(rows, bitorder="little").tobytes(), "little")


def dilate(bits: int, stride: int, radius: int) -> int:
    """Dilate by the disk x² + y² ≤ radius². stride is width + radius, so that shifts never reach the next row."""
    row, reach, dilated = bits, 0, 0
    for y in range(radius, -1, -1):  # from the disk's narrow top row to its wide centre
        while (reach + 1) ** 2 + y**2 <= radius**2:
            reach += 1
            row |= bits << reach | bits >> reach
        dilated |= row << y * stride | row >> y * stride
    return dilated


def tolerance(shape: tuple[int, ...]) -> int:
    """Largest distance in pixels of matching boundary points in an H×W frame."""
    return math.ceil(0.008 * math.hypot(*shape))


def box(mask: np.ndarray, margin: int) -> tuple[slice, slice]:
    """Bounding box of a 0/1 mask, uint8 [H, W], with a margin in pixels, as slices; empty for an empty mask."""
    left, top, width, height = cv2.boundingRect(mask)
    if not width:
        return slice(0), slice(0)
    return slice(max(top - margin, 0), top + height + margin), slice(max(left - margin, 0), left + width + margin)


def jaccard(annotation: np.ndarray, result: np.ndarray) -> float:
    """Region similarity J: intersection over union of two 0/1 masks, uint8 [H, W]; 1 where both are empty."""
    union = cv2.countNonZero(annotation | result)
    return cv2.countNonZero(annotation & result) / union if union else 1.0


def boundary_f(annotation: np.ndarray, result: np.ndarray, radius: int | None = None) -> float:
    """Contour accuracy F of two 0/1 masks, uint8 [H, W]: harmonic mean of boundary precision and recall.

    Args:
        radius: tolerance in pixels, of the whole frame if the masks are cropped; default: that of their own size.
    """
    radius = tolerance(annotation.shape) if radius is None else radius
    truth, predicted = boundary_map(annotation), boundary_map(result)
    num_truth, num_predicted = cv2.countNonZero(truth), cv2.countNonZero(predicted)
    if not num_truth or not num_predicted:
        return float(num_truth == num_predicted)
    crop = box(truth, radius)  # nothing outside can match
    stride = truth[crop].shape[1] + radius
    truth, predicted = to_bits(truth[crop], stride), to_bits(predicted[crop], stride)
    precision = (predicted & dilate(truth, stride, radius)).bit_count() / num_predicted
    recall = (truth & dilate(predicted, stride, radius)).bit_count() / num_truth
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def num_objects(annotation: np.ndarray) -> int:
    """Highest object id in the first frame's annotation, without void."""
    return int(annotation[annotation != VOID].max(initial=0))


def score_frame(annotation: np.ndarray, result: np.ndarray, objects: int) -> tuple[list[float], list[float]]:
    """J and F of objects 1 … n in one frame; both masks are ids, uint8 [H, W]. Void counts as background."""
    radius = tolerance(annotation.shape)
    js, fs = [], []
    for i in range(1, objects + 1):
        pair = [(ids == i).view(np.uint8) for ids in (annotation, result)]
        crop = box(pair[0] | pair[1], 1)  # includes all boundaries
        pair = [mask[crop] for mask in pair]
        js.append(jaccard(*pair) if pair[0].size else 1.0)
        fs.append(boundary_f(*pair, radius) if pair[0].size else 1.0)
    return js, fs


def score_sequence(annotations: np.ndarray, results: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """J and F of all frames but the first and the last, both [objects, T - 2].

    Args:
        annotations, results: ids, uint8 [T, H, W].

    Raises:
        DataError: fewer than 3 frames, no object, different shapes, or results with an unknown id.
    """
    if annotations.shape != results.shape:
        raise DataError(f"results are {list(results.shape)}, annotations {list(annotations.shape)} (T, H, W)")
    if len(annotations) < 3:
        raise DataError(f"{len(annotations)} frames; the first and last are not scored, so 3 or more are needed")
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
    # adjacent quarters share a frame, as in the official code
    decay = values[ids[0]:ids[1] + 1].mean() - values[ids[3]:ids[4] + 1].mean()
    return float(values.mean()), float((values > 0.5).mean()), float(decay)


def summarise(scores: dict[str, tuple[np.ndarray, np.ndarray]],
              absent: dict[str, list[int]] | None = None) -> tuple[dict[str, float], dict[str, tuple]]:
    """Summarise scores by sequence: the seven official measures, and (J-Mean, F-Mean) by "<sequence>_<object>".

    Args:
        scores: J and F of each sequence, [objects, T - 2].
        absent: ids to leave out, by sequence; default: none, as in the official figures.
    """
    if not scores:
        raise DataError("no sequence to score")
    by_object = {f"{name}_{i + 1}": (js[i], fs[i]) for name, (js, fs) in scores.items() for i in range(len(js))
                 if i + 1 not in (absent or {}).get(name, ())}
    j, f = (np.array([statistics(values[k]) for values in by_object.values()]).mean(0) for k in (0, 1))
    objects = {name: (float(j.mean()), float(f.mean())) for name, (j, f) in by_object.items()}
    return dict(zip(MEASURES, map(float, ((j[0] + f[0]) / 2, *j, *f)), strict=True)), objects


def score_files(annotation_folder: Path, result_folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """J and F of one sequence, [objects, T - 2], from two folders of PNGs.

    The results may lack the first and last frame, which are not scored.

    Raises:
        DataError: a frame is missing, or the masks cannot be scored.
        UnreadableImage: a PNG cannot be read.
    """
    cv2.setNumThreads(1)
    annotation_paths = numbered_files(annotation_folder, (".png",), "annotations")
    result_paths = [result_folder / path.name for path in annotation_paths]
    if not result_folder.is_dir():
        raise DataError(f"{result_folder}: no results for this sequence")
    missing = [path.name for path in result_paths[1:-1] if not path.is_file()]
    if missing:
        raise DataError(f"{result_folder}: lacks {len(missing)} of {len(result_paths)} frames, {missing[0]} first")
    annotations = read_masks(annotation_paths)
    results = np.zeros_like(annotations)
    if len(result_paths) > 2:
        middle = read_masks(result_paths[1:-1], read_mask(result_paths[1], binary=True))  # results have no void
        if middle.shape[1:] != annotations.shape[1:]:
            raise DataError(f"{result_paths[1]}: is {middle.shape[2]}×{middle.shape[1]}, "
                            f"its annotation {annotations.shape[2]}×{annotations.shape[1]}")
        results[1:-1] = middle
    try:
        return score_sequence(annotations, results)
    except DataError as error:
        raise DataError(f"{result_folder}: {error}") from None


def score_folder(davis_path: str | Path, results_path: str | Path, set_name: str = "val",
                 processes: int = 1) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Score a folder of results: J and F [objects, T - 2] by sequence, computed in several processes.

    Raises:
        DataError: a sequence cannot be scored; the message has one line for each.
    """
    names = read_set(davis_path, set_name)
    for name in names:
        check_name(name)
    folders = [(Path(davis_path) / "Annotations" / "480p" / n, Path(results_path) / n) for n in names]
    processes = min(processes, len(names))
    check_may_start(processes, "--processes", 1)
    if processes == 1:
        outcomes = [attempt_score(pair) for pair in folders]
    else:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            outcomes = list(pool.map(attempt_score, folders))
    errors = [str(outcome) for outcome in outcomes if isinstance(outcome, ConfigError)]
    if errors:
        raise DataError("\n".join(errors))
    return dict(zip(names, outcomes, strict=True))


def attempt_score(folders: tuple[Path, Path]) -> tuple[np.ndarray, np.ndarray] | ConfigError:
    try:
        return score_files(*folders)
    except ConfigError as error:
        return error
    except OSError as error:  # a folder without permission
        return DataError(str(error))


def first_annotations(davis_path: str | Path, names: Iterable[str]) -> dict[str, tuple[Path, Mask]]:
    """Read the first annotation of each sequence: (file, mask) by name."""
    folders = {name: Path(davis_path) / "Annotations" / "480p" / name for name in names}
    paths = {name: numbered_files(folder, (".png",), "annotations")[0] for name, folder in folders.items()}
    return {name: (path, read_mask(path)) for name, path in paths.items()}


def find_absent(annotations: dict[str, np.ndarray]) -> dict[str, list[int]]:
    """Ids from 1 to num_objects without a pixel in a sequence's first annotation [H, W]; no entry for no such id.

    The official figures count them as objects with perfect, empty masks.
    """
    absent = {name: sorted(set(range(1, num_objects(annotation) + 1)) - set(np.unique(annotation).tolist()))
              for name, annotation in annotations.items()}
    return {name: ids for name, ids in absent.items() if ids}


def score_notes(annotations: dict[str, tuple[Path, Mask]], scores: dict[str, tuple[np.ndarray, np.ndarray]],
                absent: dict[str, list[int]], present_objects: bool) -> Iterator[str]:
    """Notes on first annotations for the user: masks of DAVIS 2016, and ids without a pixel."""
    yield from filter(None, (binary_note(*annotation) for annotation in annotations.values()))
    if absent:
        yield absence_note(scores, absent, present_objects)


def absence_note(scores: dict[str, tuple[np.ndarray, np.ndarray]], absent: dict[str, list[int]],
                 present_objects: bool) -> str:
    """A line on ids without a pixel, with the mean that the figures do not show."""
    listed = "; ".join(f"{name}: {', '.join(map(str, ids))}" for name, ids in absent.items())
    official, present = (summarise(scores, ids)[0]["J&F-Mean"] for ids in (None, absent))
    if present_objects:
        return f"without ids that have no pixel in the first annotation ({listed}); counting them as perfect, as the " \
               f"official tool does: J&F-Mean {official:.3f}"
    return f"ids without a pixel in the first annotation count as perfect, as in the official tool ({listed}); " \
           f"J&F-Mean of the others: {present:.3f} (--present_objects)"


def format_scores(scores: dict[str, tuple[np.ndarray, np.ndarray]], absent: dict[str, list[int]] | None = None,
                  present_objects: bool = False) -> str:
    """Format the seven measures, and below them a line for each object.

    Args:
        absent: ids without a pixel in the first annotation, by sequence (find_absent), to mark.
        present_objects: leave these ids out.
    """
    absent = {name: ids for name, ids in (absent or {}).items() if name in scores}
    measures, objects = summarise(scores, absent if present_objects else None)
    marked = {f"{name}_{i}" for name, ids in absent.items() for i in ids}
    width = max(map(len, ["Sequence", *objects]))
    lines = ["  ".join(f"{m:>9}" for m in measures), "  ".join(f"{v:9.3f}" for v in measures.values()), "",
             f"{'Sequence':<{width}}  {'J-Mean':>7}  {'F-Mean':>7}"]
    lines += [f"{name:<{width}}  {j:7.3f}  {f:7.3f}{'  no pixel' if name in marked else ''}"
              for name, (j, f) in objects.items()]
    return "\n".join(lines + ([absence_note(scores, absent, present_objects)] if absent else []))


def write_csv(scores: dict[str, tuple[np.ndarray, np.ndarray]], folder: str | Path, set_name: str = "val",
              absent: dict[str, list[int]] | None = None) -> None:
    """Write the official tool's two files, global_results-<set>.csv and per-sequence_results-<set>.csv.

    Args:
        absent: ids to leave out, by sequence; default: none, as in the official figures.
    """
    measures, objects = summarise(scores, absent)
    write_text(Path(folder) / f"global_results-{set_name}.csv",
               ",".join(measures) + "\n" + ",".join(f"{v:.3f}" for v in measures.values()) + "\n")
    write_text(Path(folder) / f"per-sequence_results-{set_name}.csv", "Sequence,J-Mean,F-Mean\n" + "".join(
        f"{name},{j:.3f},{f:.3f}\n" for name, (j, f) in objects.items()))
