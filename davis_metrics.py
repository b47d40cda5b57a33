"""J & F of DAVIS 2017, semi-supervised: region and contour agreement of masks and annotations (Perazzi et al. 2016).

    python davis_metrics.py --davis_path /path/to/DAVIS --results_path /path/to/masks --task semi-supervised --set val

Options, figures and the two CSV files are those of the official davis2017-evaluation, but existing CSV files are
replaced rather than read.
"""
import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out
from selfpatch.errors import POSITIVE_INT, ArgumentParser, ConfigError, run_main, user_path
from selfpatch.video.scores import find_absent, first_annotations, format_scores, score_folder, score_notes, write_csv


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description="J & F of DAVIS 2017 (semi-supervised)")
    parser.add_argument("--davis_path", required=True, type=user_path,
                        help="folder with ImageSets, JPEGImages and Annotations")
    parser.add_argument("--results_path", required=True, type=user_path,
                        help="folder of results, <sequence>/<frame>.png; the two CSV files are written there")
    parser.add_argument("--task", default="semi-supervised", choices=["semi-supervised"],
                        help="the unsupervised task is not supported")
    parser.add_argument("--set", default="val", help="which list of ImageSets/2017 (default: val)")
    parser.add_argument("--present_objects", action="store_true",
                        help="leave out ids that have no pixel in a sequence's first annotation, which the official "
                             "figures count as perfect")
    parser.add_argument("--processes", type=POSITIVE_INT, default=os.cpu_count(),
                        help="processes that share the sequences (default: one per core)")
    return parser


def main(args: argparse.Namespace) -> int:
    """Score a folder of results, print the figures and write the CSV files.

    Returns:
        The exit status: 0, or 1 if a sequence cannot be scored (a line says why).

    Raises:
        ConfigError: an option is wrong.
    """
    if not args.results_path.is_dir():
        raise ConfigError(f"--results_path {args.results_path}: no such folder")
    try:
        scores = score_folder(args.davis_path, args.results_path, args.set, args.processes)
        annotations = first_annotations(args.davis_path, scores)
        absent = find_absent({name: mask.ids for name, (_, mask) in annotations.items()})
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    for note in score_notes(annotations, scores, absent, args.present_objects):
        print(note, file=sys.stderr)
    print(format_scores(scores, absent, args.present_objects))
    write_csv(scores, args.results_path, args.set, absent if args.present_objects else None)
    return 0


if __name__ == "__main__":
    run_main(main, get_args_parser())
