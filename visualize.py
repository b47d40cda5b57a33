"""Pictures of what a model has learnt, from any checkpoint, and of its results on videos.

    python visualize.py attention --pretrained_weights checkpoint.pth --image_path dog.jpg --output attention.png
    python visualize.py positives --pretrained_weights checkpoint.pth --image_path dog.jpg --output positives.png
    python visualize.py positives --random_weights --arch vit_small --image_path dog.jpg --patches 10,20 4,7
    python visualize.py pca --pretrained_weights checkpoint.pth --image_path dog1.jpg dog2.jpg --output pca.png
    python visualize.py similarity --pretrained_weights checkpoint.pth --image_path dog1.jpg dog2.jpg --patch 10,20
    python visualize.py overlay --davis_path DAVIS --results masks/dino masks/selfpatch --labels DINO SelfPatch
    python visualize.py scores --davis_path DAVIS --results masks/dino masks/selfpatch --labels DINO SelfPatch

attention: the class token's attention, one map per head; SelfPatch's class token is in its head.
positives: the neighbours that positive matching picks for some patches.
pca: three principal components of the patches' features as colours, fitted over all images together.
similarity: the cosine of one patch to all patches of its image and of others.
overlay: a DAVIS sequence beside the masks of one or several folders of results, as GIF, MP4 or PNGs.
scores: J&F of such folders by sequence, as a bar chart.
"""
import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import davis_metrics
import drawing
import feature_pictures
import overlays
from augmentations import IMAGENET_MEAN, IMAGENET_STD
from backbones import Backbone, TimmBackbone, check_layer, image_statistics, load_any_with_info
from checkpoint_files import CheckpointError
from checkpoints import CheckpointInfo, build_head
from davis_data import DataError, find_frames, read_mask, read_set
from drawing import fit_patches
from errors import ArgumentParser, ConfigError, run_main
from image_files import load_rgb, open_image, orientation
from model_options import add_model_options
from selfpatch_head import SelfPatchHead, neighbour_similarity, positive_matching


def row_column(text: str) -> tuple[int, int]:
    try:
        row, column = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ROW,COLUMN, such as 10,20") from None
    return row, column


def add_model_and_image(parser: argparse.ArgumentParser, output: str, images: str = "") -> None:
    """Add the options of a picture; images says what several ones are for."""
    add_model_options(parser)
    parser.add_argument("--image_path", required=True, type=os.path.expanduser, help=images or "image to draw on",
                        **({"nargs": "+", "metavar": "IMAGE"} if images else {}))
    parser.add_argument("--image_size", type=int, default=480, help="length of the image's short side, after scaling")
    parser.add_argument("--output", default=output, type=os.path.expanduser, help="PNG to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")


def check_output(output: str, overwrite: bool) -> Path:
    path = Path(output)
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--output {path}: the picture is a PNG, so give a name that ends in .png")
    if not path.parent.is_dir():
        raise ConfigError(f"--output {path}: {path.parent} is not a folder, create it first")
    if path.exists() and not overwrite:
        raise ConfigError(f"--output {path} exists: give another name, or --overwrite")
    return path


def read_image(path: str) -> Image.Image:
    """The image as RGB with its pixels as stored; prints that an EXIF orientation tag is ignored, if it has one."""
    if (tag := orientation(open_image(path))) != 1:
        print(f"{path}: EXIF orientation {tag} is ignored, as in training: pixels are used as stored")
    return load_rgb(path)


def to_tensor(image: Image.Image, statistics: tuple = (IMAGENET_MEAN, IMAGENET_STD)) -> torch.Tensor:
    """A PIL image -> [1, 3, H, W], normalised with a mean and standard deviation of each channel."""
    mean, std = statistics
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return ((pixels - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)[None]


def load(args: argparse.Namespace) -> tuple[Backbone, CheckpointInfo | None]:
    torch.manual_seed(0)  # the same random network every time
    return load_any_with_info(args.arch, args.pretrained_weights, args.checkpoint_key, args.patch_size,
                              args.random_weights)


def attention_weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Attention weights of one query [heads, D / heads] over keys [heads, M, D / heads]: [heads, M], rows sum to 1."""
    return (k @ q[:, :, None] * q.shape[-1] ** -0.5)[..., 0].softmax(-1)


def self_attention(backbone: Backbone, x: torch.Tensor, query: int, layer: int = -1) -> torch.Tensor:
    """Attention of a block from token `query` to the patches of image x [1, 3, H, W], [heads, N]."""
    q, k = backbone.queries_and_keys(x, layer)
    return attention_weights(q[0, :, query], k[0])[:, backbone.num_prefix_tokens:]


def head_attention(backbone: Backbone, head: SelfPatchHead, x: torch.Tensor, layer: int = -1) -> torch.Tensor:
    """Attention of the SelfPatch head's second block, from its class token to the patches of x, [heads, N]."""
    patches, c = backbone.features(x, layer).patches, head.cls_token[0]
    first, second = head.cls_blocks
    c = second.norm1(first.attend_projected(c, *first.project(patches)))
    keys = torch.cat([second.attn.k(c), second.project(patches)[0][0]])
    q, k = (part.unflatten(-1, (backbone.num_heads, -1)).transpose(0, 1) for part in (second.attn.q(c), keys))
    return attention_weights(q[:, 0], k)[:, 1:]


@torch.no_grad()
def draw_attention(args: argparse.Namespace) -> None:
    output = check_output(args.output, args.overwrite)
    image = read_image(args.image_path)
    backbone, info = load(args)
    check_layer(backbone, args.layer)
    image = fit_patches(image, args.image_size, backbone.patch_size)
    x = to_tensor(image, image_statistics(backbone))
    grid = backbone.grid_size(x)
    if args.patch is not None:
        query = check_patches([args.patch], grid, "--patch")[0] + backbone.num_prefix_tokens
        maps, source = self_attention(backbone, x, query, args.layer), "patch"
    elif backbone.has_class_token:
        maps, source = self_attention(backbone, x, 0, args.layer), "class token"
    else:
        if isinstance(backbone, TimmBackbone):
            raise ConfigError(f"--arch {args.arch} has no class token: give --patch ROW,COLUMN for a patch's attention")
        if info is None:
            head = SelfPatchHead(backbone.embed_dim, backbone.num_heads).eval()
        elif any(name.startswith("ca_head.") for name in info.other_tensors):
            head = build_head(info, 4)  # any number: attention does not depend on it
        else:
            raise CheckpointError(f"{info.path} has neither a class token nor a SelfPatch head (ca_head): give a "
                                  "training checkpoint, or --patch ROW,COLUMN for a patch's own attention")
        maps, source = head_attention(backbone, head, x, args.layer), "class token of the SelfPatch head"
    drawing.attention_maps(image, maps.unflatten(1, grid).numpy(), args.patch, backbone.patch_size).save(output)
    print(f"wrote {output}: attention of the {source} over {grid[0]}×{grid[1]} patches, {len(maps)} heads")


def check_patches(patches: list[tuple[int, int]], grid: tuple[int, int], option: str) -> list[int]:
    """Indices of (row, column) patches, row by row."""
    for row, column in patches:
        if not (0 <= row < grid[0] and 0 <= column < grid[1]):
            raise ConfigError(f"{option} {row},{column} is outside the image, whose patches are 0,0 to "
                             f"{grid[0] - 1},{grid[1] - 1}")
    return [row * grid[1] + column for row, column in patches]


@torch.no_grad()
def draw_positives(args: argparse.Namespace) -> None:
    output = check_output(args.output, args.overwrite)
    image = read_image(args.image_path)
    backbone, info = load(args)
    check_layer(backbone, args.layer)
    try:
        k_num = args.k_num or (info.k_num if info else 4)
    except CheckpointError as error:
        raise CheckpointError(f"{error}: give --k_num") from None
    image = fit_patches(image, args.image_size, backbone.patch_size)
    x = to_tensor(image, image_statistics(backbone))
    grid = backbone.grid_size(x)
    rows, columns = ([side * n // 6 for n in (1, 3, 5)] for side in grid)
    patches = args.patches or [(row, column) for row in rows for column in columns]
    queries = check_patches(patches, grid, "--patches")
    layer = range(len(backbone.blocks))[args.layer]
    features = backbone.get_intermediate_layers(x, [layer])[0]  # before a final norm, as the loss compares them
    chosen = positive_matching(features, grid, k_num)[0, queries]
    similarity = neighbour_similarity(features, grid)[0, queries].sort(dim=-1, descending=True).values
    positives = [[divmod(index, grid[1]) for index in row] for row in chosen.tolist()]
    drawing.positives(image, backbone.patch_size, patches, positives).save(output)
    for patch, picks, cosines in zip(patches, positives, similarity.tolist(), strict=True):
        listed = "  ".join(f"{r},{c} ({cosine:.2f})" for (r, c), cosine in zip(picks, cosines, strict=False))
        print(f"patch {patch[0]},{patch[1]}: {listed}")
    print(f"wrote {output}: {k_num} positives each of {len(patches)} of {grid[0]}×{grid[1]} patches")


def features_of_images(args: argparse.Namespace) -> tuple[Backbone, list[Image.Image], list[torch.Tensor],
                                                          list[tuple[int, int]]]:
    """The backbone, and each image fitted to its patches, its features [N, D] and its grid."""
    images = [read_image(path) for path in args.image_path]
    backbone = load(args)[0]
    check_layer(backbone, args.layer)
    images = [fit_patches(image, args.image_size, backbone.patch_size) for image in images]
    inputs = [to_tensor(image, image_statistics(backbone)) for image in images]
    return (backbone, images, [backbone.features(x, args.layer).patches[0] for x in inputs],
            [backbone.grid_size(x) for x in inputs])


@torch.no_grad()
def draw_pca(args: argparse.Namespace) -> None:
    output = check_output(args.output, args.overwrite)
    _, images, features, grids = features_of_images(args)
    colours, coloured = feature_pictures.component_colours(torch.cat(features), grids, not args.all_patches)
    feature_pictures.component_panels(images, colours).save(output)
    print(f"wrote {output}: principal components of {int(coloured.sum())} of {len(coloured)} patches")


@torch.no_grad()
def draw_similarity(args: argparse.Namespace) -> None:
    output = check_output(args.output, args.overwrite)
    backbone, images, features, grids = features_of_images(args)
    patch = args.patch or (grids[0][0] // 2, grids[0][1] // 2)
    query = features[0][check_patches([patch], grids[0], "--patch")[0]]
    cosines = [feature_pictures.similarity(query, one) for one in features]
    maps = [one.unflatten(0, grid).numpy() for one, grid in zip(cosines, grids, strict=True)]
    feature_pictures.similarity_panels(images, maps, patch, backbone.patch_size).save(output)
    print(f"wrote {output}: cosine of patch {patch[0]},{patch[1]} to {sum(map(len, cosines))} patches")


def add_pca(subparsers) -> None:
    parser = subparsers.add_parser("pca", help="three principal components of the features as colours")
    add_model_and_image(parser, "pca.png", "images whose patches are fitted together")
    parser.add_argument("--all_patches", action="store_true", help="colour the background as well")
    parser.set_defaults(func=draw_pca)


def add_similarity(subparsers) -> None:
    parser = subparsers.add_parser("similarity", help="one patch's cosine to all others")
    add_model_and_image(parser, "similarity.png", "image of the patch, then others to compare it with")
    parser.add_argument("--patch", type=row_column, metavar="ROW,COLUMN", help="default: in the middle of the image")
    parser.set_defaults(func=draw_similarity)


def add_attention(subparsers) -> None:
    parser = subparsers.add_parser("attention", help="the class token's attention, one map per head")
    add_model_and_image(parser, "attention.png")
    parser.add_argument("--patch", type=row_column, metavar="ROW,COLUMN",
                        help="draw this patch's attention in the backbone's block, not the class token's")
    parser.set_defaults(func=draw_attention)


def add_positives(subparsers) -> None:
    parser = subparsers.add_parser("positives", help="the neighbours that positive matching picks")
    add_model_and_image(parser, "positives.png")
    parser.add_argument("--patches", type=row_column, nargs="+", metavar="ROW,COLUMN",
                        help="patches to match, counted from 0 at the upper left; default: nine, evenly spaced")
    parser.add_argument("--k_num", type=int, choices=range(1, 9),
                        help="positives per patch; default: the run's own, or 4")
    parser.set_defaults(func=draw_positives)


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
    labels, output = result_labels(args), check_output(args.output, args.overwrite)
    scores = [davis_metrics.score_folder(args.davis_path, folder, args.set, args.processes) for folder in args.results]
    annotations = davis_metrics.first_annotations(args.davis_path, scores[0])
    absent = davis_metrics.find_absent({name: mask.ids for name, (_, mask) in annotations.items()})
    for label, one in zip(labels, scores, strict=True):
        for note in davis_metrics.score_notes(annotations, one, absent, args.present_objects):
            print(f"{label}: {note}", file=sys.stderr)
    left_out = absent if args.present_objects else {}
    groups = {"all objects": [davis_metrics.summarise(one, left_out)[0]["J&F-Mean"] for one in scores]}
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


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Pictures of what a model has learnt")
    subparsers = parser.add_subparsers(required=True, metavar="{attention,positives,pca,similarity,overlay,scores}")
    add_attention(subparsers)
    add_positives(subparsers)
    add_pca(subparsers)
    add_similarity(subparsers)
    add_overlay(subparsers)
    add_scores(subparsers)
    return parser


def main(args: argparse.Namespace) -> None:
    try:
        args.func(args)
    except OSError as error:  # the disk: what is wrong with inputs is a ConfigError
        raise ConfigError(str(error)) from None


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
