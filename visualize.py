"""Pictures of what a backbone has learnt, of results on videos, and of how training went.

    python visualize.py attention --pretrained_weights checkpoint.pth --image_path dog.jpg --output attention.png
    python visualize.py positives --pretrained_weights checkpoint.pth --image_path dog.jpg --output positives.png
    python visualize.py positives --random_weights --arch vit_small --image_path dog.jpg --patches 10,20 4,7
    python visualize.py pca --pretrained_weights checkpoint.pth --image_path dog1.jpg dog2.jpg --output pca.png
    python visualize.py similarity --pretrained_weights checkpoint.pth --image_path dog1.jpg dog2.jpg --patch 10,20
    python visualize.py overlay --davis_path DAVIS --results masks/dino masks/selfpatch --labels DINO SelfPatch
    python visualize.py scores --davis_path DAVIS --results masks/dino masks/selfpatch --labels DINO SelfPatch
    python visualize.py curves runs/one runs/two --output curves.png

attention: attention of the class token, one map per head; SelfPatch's class token is in its head.
positives: the neighbours that positive matching picks for some patches.
pca: three principal components of the patches' features as colours, fitted to all images together.
similarity: cosine similarity of one patch to all patches of its image and of others.
overlay: a DAVIS sequence beside the masks of one or several folders of results, as GIF, MP4 or PNGs.
scores: J&F of such folders by sequence, as a bar chart.
curves: losses beside ln K, rates and k-NN accuracy of one or several training runs.
"""
import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out
import torch
from PIL import Image
from tqdm import tqdm

from selfpatch.checkpoints.backbones import Backbone, TimmBackbone, check_layer
from selfpatch.checkpoints.files import CheckpointError
from selfpatch.checkpoints.loading import CheckpointInfo, build_head, load_with_info
from selfpatch.distributed.precision import autocast, choose_dtype
from selfpatch.distributed.processes import pick_device
from selfpatch.errors import (
    POSITIVE_FLOAT,
    POSITIVE_INT,
    ArgumentParser,
    ConfigError,
    Number,
    require_packages,
    run_main,
)
from selfpatch.evaluation.model_options import add_device_options, add_model_options
from selfpatch.evaluation.tables import check_output, tell_apart
from selfpatch.method.selfpatch_head import SelfPatchHead, neighbour_similarity, positive_matching
from selfpatch.video.davis import DataError, find_frames, read_set
from selfpatch.video.scores import find_absent, first_annotations, score_folder, score_notes
from selfpatch.visualization import curves, videos
from selfpatch.visualization import features as pictures
from selfpatch.visualization.features import head_attention, self_attention
from selfpatch.visualization.inputs import check_patches, cut_images, read_image

# ---------------------------------------------------------------- options


def row_column(text: str) -> tuple[int, int]:
    try:
        row, column = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ROW,COLUMN, such as 10,20") from None
    return row, column


def check_png(output: str | Path, overwrite: bool) -> Path:
    """check_output for a picture; returns its path.

    Raises:
        ConfigError: the name does not end in .png as well.
    """
    if Path(output).suffix.lower() != ".png":
        raise ConfigError(f"--output {output}: the picture is a PNG, so give a name that ends in .png")
    check_output(output, overwrite)
    return Path(output)


def add_output(parser: argparse.ArgumentParser, default: str | None, text: str = "PNG to write") -> None:
    parser.add_argument("--output", default=default, type=os.path.expanduser, help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")


def add_model_and_image(parser: argparse.ArgumentParser, output: str, images: str = "") -> None:
    """Add the options of a backbone's picture of one image, or of several, whose help is `images`."""
    add_model_options(parser)
    add_device_options(parser)
    parser.add_argument("--image_path", required=True, type=os.path.expanduser, help=images or "image to draw on",
                        **({"nargs": "+", "metavar": "IMAGE"} if images else {}))
    parser.add_argument("--image_size", type=int, default=480, help="length of the image's short side, after scaling")
    add_output(parser, output)


def add_results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--davis_path", required=True, type=os.path.expanduser,
                        help="folder with ImageSets, JPEGImages and Annotations")
    parser.add_argument("--results", required=True, nargs="+", type=os.path.expanduser, metavar="FOLDER",
                        help="folders with <sequence>/<frame>.png, such as Annotations/480p itself")
    parser.add_argument("--labels", nargs="+", help="their labels; default: the folders' names")
    parser.add_argument("--set", default="val", help="which list of ImageSets/2017")


def choose_labels(labels: list[str] | None, names: list[str], noun: str) -> list[str]:
    """The labels given, or the names. Raise ConfigError if there are not as many labels as names."""
    if labels and len(labels) != len(names):
        raise ConfigError(f"--labels: {len(labels)} given for {len(names)} {noun}")
    return labels or names


def result_labels(args: argparse.Namespace) -> list[str]:
    labels = choose_labels(args.labels, [Path(folder).name for folder in args.results], "folders of --results")
    for folder in args.results:
        if not Path(folder).is_dir():
            raise ConfigError(f"--results {folder}: no such folder")
    return labels


# ---------------------------------------------------------------- images and backbones

def load(args: argparse.Namespace) -> tuple[Backbone, CheckpointInfo | None]:
    torch.manual_seed(0)  # the same random network every time
    return load_with_info(args.pretrained_weights, args.checkpoint_key, args.arch, args.patch_size, args.random_weights)


def load_with_images(args: argparse.Namespace, paths: list[str]) -> tuple[Backbone, CheckpointInfo | None,
                                                                          list[Image.Image], list[torch.Tensor]]:
    """The backbone on the device, what is known of its file, and the result of cut_images."""
    device = pick_device(args.device)
    choose_dtype(args.precision, device)  # or raise
    images = [read_image(path) for path in paths]
    backbone, info = load(args)
    check_layer(backbone, args.layer)
    backbone.to(device).requires_grad_(False)
    return backbone, info, *cut_images(paths, images, args.image_size, backbone)


def precision(args: argparse.Namespace, x: torch.Tensor) -> torch.autocast:
    return autocast(x.device, choose_dtype(args.precision, x.device))


# ---------------------------------------------------------------- commands

def class_token_head(args: argparse.Namespace, backbone: Backbone, info: CheckpointInfo | None) -> SelfPatchHead:
    """The SelfPatch head, whose class token attends to the patches of a backbone without one of its own.

    Raises:
        ConfigError: there is none.
    """
    if isinstance(backbone, TimmBackbone):
        raise ConfigError(f"--arch {args.arch} has no class token: give --patch ROW,COLUMN for a patch's attention")
    if info is None:
        return SelfPatchHead(backbone.embed_dim, backbone.num_heads).eval()
    if not info.has_selfpatch_head:
        raise CheckpointError(f"{info.path} has neither a class token nor a SelfPatch head (ca_head): give a "
                              "training checkpoint, or --patch ROW,COLUMN for a patch's own attention")
    return build_head(info, 4)  # any number: attention does not depend on it


def draw_attention(args: argparse.Namespace) -> None:
    output = check_png(args.output, args.overwrite)
    backbone, info, (image,), (x,) = load_with_images(args, [args.image_path])
    grid = backbone.grid_size(x)
    with precision(args, x):
        if args.patch is not None:
            query = check_patches([args.patch], grid, "--patch")[0] + backbone.num_prefix_tokens
            maps, source = self_attention(backbone, x, query, args.layer), "patch"
        elif backbone.has_class_token:
            maps, source = self_attention(backbone, x, 0, args.layer), "class token"
        else:
            head = class_token_head(args, backbone, info).to(x.device).requires_grad_(False)
            maps, source = head_attention(backbone, head, x, args.layer), "class token of the SelfPatch head"
    maps = maps.float().cpu().unflatten(1, grid).numpy()
    pictures.attention_panels(image, maps, args.patch, backbone.patch_size).save(output)
    print(f"wrote {output}: attention of the {source} over {grid[0]}×{grid[1]} patches, {len(maps)} heads")


def draw_positives(args: argparse.Namespace) -> None:
    output = check_png(args.output, args.overwrite)
    backbone, info, (image,), (x,) = load_with_images(args, [args.image_path])
    try:
        k_num = args.k_num or (info.k_num if info else 4)
    except CheckpointError as error:
        raise CheckpointError(f"{error}: give --k_num") from None
    grid = backbone.grid_size(x)
    rows, columns = ([side * n // 6 for n in (1, 3, 5)] for side in grid)
    patches = args.patches or [(row, column) for row in rows for column in columns]
    queries = check_patches(patches, grid, "--patches")
    layer = range(len(backbone.blocks))[args.layer]
    with precision(args, x):  # before a final norm, as the loss compares them
        features = backbone.get_intermediate_layers(x, [layer])[0].float().cpu()
    chosen = positive_matching(features, grid, k_num)[0, queries]
    similarity = neighbour_similarity(features, grid)[0, queries].sort(dim=-1, descending=True).values
    positives = [[divmod(index, grid[1]) for index in row] for row in chosen.tolist()]
    pictures.positives_over(image, backbone.patch_size, patches, positives).save(output)
    for patch, picks, cosines in zip(patches, positives, similarity.tolist(), strict=True):
        listed = "  ".join(f"{r},{c} ({cosine:.2f})" for (r, c), cosine in zip(picks, cosines, strict=False))
        print(f"patch {patch[0]},{patch[1]}: {listed}")
    print(f"wrote {output}: {k_num} positives each of {len(patches)} of {grid[0]}×{grid[1]} patches")


def draw_pca(args: argparse.Namespace) -> None:
    output = check_png(args.output, args.overwrite)
    backbone, _, images, inputs = load_with_images(args, args.image_path)
    with precision(args, inputs[0]):
        features = torch.cat([backbone.features(x, args.layer).patches[0].float().cpu() for x in inputs])
    colours, coloured = pictures.component_colours(features, [backbone.grid_size(x) for x in inputs],
                                                   foreground=not args.all_patches)
    pictures.component_panels(images, colours).save(output)
    print(f"wrote {output}: principal components of {int(coloured.sum())} of {len(coloured)} patches")


def draw_similarity(args: argparse.Namespace) -> None:
    output = check_png(args.output, args.overwrite)
    backbone, _, images, inputs = load_with_images(args, args.image_path)
    with precision(args, inputs[0]):
        features = [backbone.features(x, args.layer).patches[0].float().cpu() for x in inputs]
    grids = [backbone.grid_size(x) for x in inputs]
    patch = args.patch or (grids[0][0] // 2, grids[0][1] // 2)
    query = features[0][check_patches([patch], grids[0], "--patch")[0]]
    cosines = [pictures.similarity(query, one) for one in features]
    maps = [one.unflatten(0, grid).numpy() for one, grid in zip(cosines, grids, strict=True)]
    pictures.similarity_panels(images, maps, patch, backbone.patch_size).save(output)
    print(f"wrote {output}: cosine of patch {patch[0]},{patch[1]} to {sum(map(len, cosines))} patches")


def draw_overlay(args: argparse.Namespace) -> None:
    labels = result_labels(args)
    name = args.sequence or read_set(args.davis_path, args.set)[0]
    output = Path(args.output or f"{name}.gif")
    if output.suffix.lower() not in (".gif", ".mp4", ""):
        raise ConfigError(f"--output {output}: give a .gif, a .mp4, or a folder for PNGs")
    check_output(output, args.overwrite)
    frames = find_frames(args.davis_path, name)
    masks = [[Path(folder) / name / f"{frame.stem}.png" for frame in frames] for folder in args.results]
    for path in (path for paths in masks for path in paths if not path.is_file()):
        raise DataError(f"{path}: no result for this frame")
    drawn = videos.overlay_frames(frames, masks, labels, args.width)
    videos.write_video(tqdm(drawn, name, len(frames)), output, args.fps)
    print(f"wrote {output}: {len(frames)} frames of {name}")


def draw_scores(args: argparse.Namespace) -> None:
    require_packages("visualize.py scores", "matplotlib")
    labels, output = result_labels(args), check_png(args.output, args.overwrite)
    scores = [score_folder(args.davis_path, folder, args.set, args.processes) for folder in args.results]
    annotations = first_annotations(args.davis_path, scores[0])
    absent = find_absent({name: mask.ids for name, (_, mask) in annotations.items()})
    for label, one in zip(labels, scores, strict=True):
        for note in score_notes(annotations, one, absent, args.present_objects):
            print(f"{label}: {note}", file=sys.stderr)
    groups = videos.group_scores(scores, absent if args.present_objects else {})
    videos.bar_chart(groups, labels, f"J&F of {args.set}").savefig(output, dpi=100)
    print(f"wrote {output}: " + ", ".join(f"{label} {value:.3f}" for label, value in
                                          zip(labels, groups["all objects"], strict=True)))


def draw_curves(args: argparse.Namespace) -> None:
    require_packages("visualize.py curves", "matplotlib")
    output = check_png(args.output, args.overwrite)
    if len(args.runs) > curves.NUM_COLOURS:
        raise ConfigError(f"{len(args.runs)} runs: give at most {curves.NUM_COLOURS}, or their colours repeat")
    labels = choose_labels(args.labels, tell_apart([Path(run).resolve().name for run in args.runs]), "runs")
    runs = [curves.read_run(Path(run)) for run in args.runs]
    panels = curves.make_panels(runs)
    if not panels:
        raise ConfigError(f"{', '.join(args.runs)}: no losses or rates in log.txt or steps.jsonl")
    curves.draw_panels(panels, labels).savefig(output, dpi=150)
    print(f"wrote {output}: " + ", ".join(f"{label} ({len(steps)} rows of steps, {len(epochs)} of epochs)" for
                                          label, (steps, epochs) in zip(labels, runs, strict=True)))


# ---------------------------------------------------------------- the job

def add_model_commands(add_command) -> None:
    """Add the commands that draw a backbone's features; add_command(name, function, help) returns a parser."""
    parser = add_command("attention", draw_attention, "the class token's attention, one map per head")
    add_model_and_image(parser, "attention.png")
    parser.add_argument("--patch", type=row_column, metavar="ROW,COLUMN",
                        help="draw this patch's attention in the backbone's block, not the class token's")

    parser = add_command("positives", draw_positives, "the neighbours that positive matching picks")
    add_model_and_image(parser, "positives.png")
    parser.add_argument("--patches", type=row_column, nargs="+", metavar="ROW,COLUMN",
                        help="patches to match, counted from 0 at the upper left; default: nine, evenly spaced")
    parser.add_argument("--k_num", type=int, choices=range(1, 9),
                        help="positives per patch; default: the run's own, or 4")

    parser = add_command("pca", draw_pca, "three principal components of the features as colours")
    add_model_and_image(parser, "pca.png", "images whose patches are fitted together")
    parser.add_argument("--all_patches", action="store_true", help="colour the background as well")

    parser = add_command("similarity", draw_similarity, "one patch's cosine to all others")
    add_model_and_image(parser, "similarity.png", "image of the patch, then others to compare it with")
    parser.add_argument("--patch", type=row_column, metavar="ROW,COLUMN", help="default: in the middle of the image")


def add_result_commands(add_command) -> None:
    """Add the commands that draw results: masks of videos, their scores, and training runs."""
    parser = add_command("overlay", draw_overlay, "masks over the frames of a DAVIS sequence")
    add_results(parser)
    parser.add_argument("--sequence", help="its name; default: the first of the list")
    add_output(parser, None, ".gif, .mp4, or a new folder for PNGs; default: <sequence>.gif")
    parser.add_argument("--fps", type=POSITIVE_FLOAT, default=12, help="frames per second")
    parser.add_argument("--width", type=Number(int, 16), default=427, help="width of each panel in pixels")

    parser = add_command("scores", draw_scores, "J&F of every DAVIS sequence as a bar chart")
    add_results(parser)
    add_output(parser, "scores.png")
    parser.add_argument("--processes", type=POSITIVE_INT, default=1, help="processes that share the scoring")
    parser.add_argument("--present_objects", action="store_true",
                        help="leave out ids that have no pixel in a sequence's first annotation, which the official "
                             "figures count as perfect")

    parser = add_command("curves", draw_curves, "losses, rates and k-NN of runs, from log.txt and steps.jsonl")
    parser.add_argument("runs", nargs="+", type=os.path.expanduser, metavar="RUN", help="folders of runs")
    parser.add_argument("--labels", nargs="+", help="their labels; default: the folders' names")
    add_output(parser, "curves.png")


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Pictures of what a model has learnt")
    subparsers = parser.add_subparsers(required=True,
                                       metavar="{attention,positives,pca,similarity,overlay,scores,curves}")

    def add_command(name, function, text):
        command = subparsers.add_parser(name, help=text)
        command.set_defaults(func=function)
        return command

    add_model_commands(add_command)
    add_result_commands(add_command)
    return parser


def main(args: argparse.Namespace) -> None:
    try:
        args.func(args)
    except OSError as error:  # the disk: what is wrong with inputs is a ConfigError
        raise ConfigError(str(error)) from None


if __name__ == "__main__":
    run_main(main, get_args_parser())
