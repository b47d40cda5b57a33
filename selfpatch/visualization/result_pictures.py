"""The pictures of visualize.py that show results on videos: masks over frames, and J & F as a bar chart."""
import argparse
import os
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from selfpatch.data.files import load_rgb
from selfpatch.errors import ConfigError
from selfpatch.evaluation.tables import check_png
from selfpatch.video import scores as davis_scores
from selfpatch.video.davis import DataError, find_frames, read_mask, read_set
from selfpatch.visualization import videos as overlays


def result_labels(args: argparse.Namespace) -> list[str]:
    labels = args.labels or [Path(folder).name for folder in args.results]
    if len(labels) != len(args.results):
        raise ConfigError(f"--labels: {len(labels)} given for {len(args.results)} folders of --results")
    for folder in args.results:
        if not Path(folder).is_dir():
            raise ConfigError(f"--results {folder}: no such folder")
    return labels


def draw_overlay(args: argparse.Namespace) -> None:
    labels = result_labels(args)
    name = args.sequence or read_set(args.davis_path, args.set)[0]
    output = Path(args.output or f"{name}.gif")
    if output.suffix.lower() not in (".gif", ".mp4", ""):
        raise ConfigError(f"--output {output}: give a .gif, a .mp4, or a folder for PNGs")
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: {output.parent} is not a folder, create it first")
    if output.exists() and (not args.overwrite or output.is_dir()):
        raise ConfigError(f"--output {output} exists: give another name"
                          + ("" if output.is_dir() else ", or --overwrite"))
    if args.fps <= 0 or args.width < 16:
        raise ConfigError(f"--fps {args.fps:g} --width {args.width}: give more than 0 and at least 16")
    frames = find_frames(args.davis_path, name)
    masks = [[Path(folder) / name / f"{frame.stem}.png" for frame in frames] for folder in args.results]
    for path in (path for paths in masks for path in paths if not path.is_file()):
        raise DataError(f"{path}: no result for this frame")

    binary = [read_mask(paths[0]).binary for paths in masks]  # one decision for a video: is 255 void or an object?

    def pictures():
        for frame, *paths in tqdm(zip(frames, *masks, strict=True), name, len(frames)):
            panels = [np.asarray(load_rgb(frame))]
            for path, is_binary in zip(paths, binary, strict=True):
                mask, palette, *_ = read_mask(path, is_binary)
                if mask.shape != panels[0].shape[:2]:
                    raise DataError(f"{path}: is {mask.shape[1]}×{mask.shape[0]}, not of its frame's size")
                panels.append(overlays.overlay(panels[0], mask, palette))
            yield overlays.side_by_side(panels, ["video", *labels], args.width)

    overlays.write_video(pictures(), output, args.fps)
    print(f"wrote {output}: {len(frames)} frames of {name}")


def draw_scores(args: argparse.Namespace) -> None:
    labels, output = result_labels(args), check_png(args.output, args.overwrite)
    scores = [davis_scores.score_folder(args.davis_path, folder, args.set, args.processes) for folder in args.results]
    annotations = davis_scores.first_annotations(args.davis_path, scores[0])
    absent = davis_scores.find_absent({name: mask.ids for name, (_, mask) in annotations.items()})
    for label, one in zip(labels, scores, strict=True):
        for note in davis_scores.score_notes(annotations, one, absent, args.present_objects):
            print(f"{label}: {note}", file=sys.stderr)
    left_out = absent if args.present_objects else {}
    groups = {"all objects": [davis_scores.summarise(one, left_out)[0]["J&F-Mean"] for one in scores]}
    for name in scores[0]:  # J and F of all its objects and frames
        rows = [i for i in range(len(scores[0][name][0])) if i + 1 not in left_out.get(name, ())]
        groups[name] = [float(np.mean([values[rows] for values in one[name]])) for one in scores]
    overlays.bar_chart(groups, labels, f"J&F of {args.set}").save(output)
    print(f"wrote {output}: " + ", ".join(f"{label} {value:.3f}" for label, value in
                                          zip(labels, groups["all objects"], strict=True)))


def add_results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--davis_path", required=True, type=os.path.expanduser,
                        help="folder with ImageSets, JPEGImages and Annotations")
    parser.add_argument("--results", required=True, nargs="+", type=os.path.expanduser, metavar="FOLDER",
                        help="folders with <sequence>/<frame>.png, such as Annotations/480p itself")
    parser.add_argument("--labels", nargs="+", help="their labels; default: the folders' names")
    parser.add_argument("--set", default="val", help="which list of ImageSets/2017")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")


def add_overlay(subparsers) -> None:
    parser = subparsers.add_parser("overlay", help="masks over the frames of a DAVIS sequence")
    add_results(parser)
    parser.add_argument("--sequence", help="its name; default: the first of the list")
    parser.add_argument("--output", type=os.path.expanduser,
                        help=".gif, .mp4, or a new folder for PNGs; default: <sequence>.gif")
    parser.add_argument("--fps", type=float, default=12, help="frames per second")
    parser.add_argument("--width", type=int, default=427, help="width of each panel in pixels")
    parser.set_defaults(func=draw_overlay)


def add_scores(subparsers) -> None:
    parser = subparsers.add_parser("scores", help="J&F of every DAVIS sequence as a bar chart")
    add_results(parser)
    parser.add_argument("--output", default="scores.png", type=os.path.expanduser, help="PNG to write")
    parser.add_argument("--processes", type=int, default=1, help="processes that share the scoring")
    parser.add_argument("--present_objects", action="store_true",
                        help="leave out ids that have no pixel in a sequence's first annotation, which the official "
                             "figures count as perfect")
    parser.set_defaults(func=draw_scores)
