"""Pictures of what a model has learnt, from any checkpoint, and of its results on videos.

    python visualize.py attention --pretrained_weights checkpoint.pth --image_path dog.jpg --output attention.png
    python visualize.py positives --pretrained_weights checkpoint.pth --image_path dog.jpg --output positives.png
    python visualize.py positives --random_weights --arch vit_small --image_path dog.jpg --patches 10,20 4,7
    python visualize.py overlay --davis_path DAVIS --results masks/dino masks/selfpatch --labels DINO SelfPatch
    python visualize.py scores --davis_path DAVIS --results masks/dino masks/selfpatch --labels DINO SelfPatch

attention: the class token's attention, one map per head; SelfPatch's class token is in its head.
positives: the neighbours that positive matching picks for some patches.
overlay: a DAVIS sequence beside the masks of one or several folders of results, as GIF, MP4 or PNGs.
scores: J&F of such folders by sequence, as a bar chart.
"""
import argparse
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import davis_metrics
import drawing
import overlays
from augmentations import IMAGENET_MEAN, IMAGENET_STD
from checkpoint_files import CheckpointError
from checkpoints import CheckpointInfo, build_head, load_with_info
from davis_data import DataError, find_sequence, read_mask, read_set
from errors import ArgumentParser, ConfigError, run_main
from image_files import load_rgb, open_image, orientation
from selfpatch_head import SelfPatchHead, neighbour_similarity, positive_matching
from vision_transformer import ARCHS, VisionTransformer


def row_column(text: str) -> tuple[int, int]:
    try:
        row, column = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ROW,COLUMN, such as 10,20") from None
    return row, column


def add_model_and_image(parser: argparse.ArgumentParser, output: str) -> None:
    parser.add_argument("--pretrained_weights", default="", type=os.path.expanduser, help="checkpoint of any kind")
    parser.add_argument("--random_weights", action="store_true", help="use an untrained network, without a checkpoint")
    parser.add_argument("--checkpoint_key", default="teacher", help="network of a training run: teacher or student")
    parser.add_argument("--arch", choices=list(ARCHS), help="default: the checkpoint's own; vit_small without one")
    parser.add_argument("--patch_size", type=int, help="default: the checkpoint's own; 16 without one")
    parser.add_argument("--image_path", required=True, type=os.path.expanduser, help="image to draw on")
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


def fit_patches(image: Image.Image, short_side: int, patch_size: int) -> Image.Image:
    """The image, scaled to short_side and cropped at the right and bottom to whole patches."""
    if short_side < 3 * patch_size:
        raise ConfigError(f"--image_size {short_side} is under 3 patches of {patch_size}: give {3 * patch_size} or "
                          "more")
    if max(image.size) > 16 * min(image.size):
        raise ConfigError(f"the image is {image.width}×{image.height}: with one side more than 16 times the other it "
                          "has too many patches, crop it")
    scale = short_side / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    return image.crop((0, 0, *(side // patch_size * patch_size for side in image.size)))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """A PIL image -> [1, 3, H, W], normalised with ImageNet's mean and standard deviation."""
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return ((pixels - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)).permute(2, 0, 1)[None]


def load(args: argparse.Namespace) -> tuple[VisionTransformer, CheckpointInfo | None]:
    torch.manual_seed(0)  # the same random network every time
    return load_with_info(args.pretrained_weights, args.checkpoint_key, args.arch, args.patch_size,
                          args.random_weights)


def split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[M, D] -> [heads, M, D / heads]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(0, 1)


def attention_weights(q: torch.Tensor, k: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Attention weights of one query q [1, D] over keys k [M, D], for each head: [heads, M], rows sum to 1."""
    q, k = split_heads(q, num_heads), split_heads(k, num_heads)
    return (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)[:, 0]


def self_attention(backbone: VisionTransformer, x: torch.Tensor, query: int) -> torch.Tensor:
    """Attention of the last block from token `query` to the patches of image x [1, 3, H, W], [heads, N]."""
    tokens = backbone.prepare_tokens(x)
    for block in backbone.blocks[:-1]:
        tokens = block(tokens)
    block = backbone.blocks[-1]
    q, k, _ = block.attn.qkv(block.norm1(tokens))[0].chunk(3, dim=-1)
    weights = attention_weights(q[query:query + 1], k, backbone.num_heads)
    return weights if backbone.cls_token is None else weights[:, 1:]


def head_attention(backbone: VisionTransformer, head: SelfPatchHead, x: torch.Tensor) -> torch.Tensor:
    """Attention of the SelfPatch head's second block, from its class token to the patches of x, [heads, N]."""
    patches, c = backbone(x), head.cls_token[0]
    first, second = head.cls_blocks
    c = second.norm1(first.attend_projected(c, *first.project(patches)))
    keys = second.project(patches)[0][0]
    return attention_weights(second.attn.q(c), torch.cat([second.attn.k(c), keys]), backbone.num_heads)[:, 1:]


@torch.no_grad()
def draw_attention(args: argparse.Namespace) -> None:
    output = check_output(args.output, args.overwrite)
    image = read_image(args.image_path)
    backbone, info = load(args)
    image = fit_patches(image, args.image_size, backbone.patch_size)
    x = to_tensor(image)
    grid = backbone.grid_size(x)
    if args.patch is not None:
        query = check_patches([args.patch], grid, "--patch")[0] + (backbone.cls_token is not None)
        maps, source = self_attention(backbone, x, query), "patch"
    elif backbone.cls_token is not None:
        maps, source = self_attention(backbone, x, 0), "class token"
    else:
        if info is None:
            head = SelfPatchHead(backbone.embed_dim, backbone.num_heads).eval()
        elif any(name.startswith("ca_head.") for name in info.other_tensors):
            head = build_head(info, 4)  # any number: attention does not depend on it
        else:
            raise CheckpointError(f"{info.path} has neither a class token nor a SelfPatch head (ca_head): give a "
                                  "training checkpoint, or --patch ROW,COLUMN for a patch's own attention")
        maps, source = head_attention(backbone, head, x), "class token of the SelfPatch head"
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
    try:
        k_num = args.k_num or (info.k_num if info else 4)
    except CheckpointError as error:
        raise CheckpointError(f"{error}: give --k_num") from None
    image = fit_patches(image, args.image_size, backbone.patch_size)
    x = to_tensor(image)
    grid = backbone.grid_size(x)
    rows, columns = ([side * n // 6 for n in (1, 3, 5)] for side in grid)
    patches = args.patches or [(row, column) for row in rows for column in columns]
    queries = check_patches(patches, grid, "--patches")
    features = backbone.get_intermediate_layers(x, 1)[0]  # before a final norm, as the loss compares them
    chosen = positive_matching(features, grid, k_num)[0, queries]
    similarity = neighbour_similarity(features, grid)[0, queries].sort(dim=-1, descending=True).values
    positives = [[divmod(index, grid[1]) for index in row] for row in chosen.tolist()]
    drawing.positives(image, backbone.patch_size, patches, positives).save(output)
    for patch, picks, cosines in zip(patches, positives, similarity.tolist(), strict=True):
        listed = "  ".join(f"{r},{c} ({cosine:.2f})" for (r, c), cosine in zip(picks, cosines, strict=False))
        print(f"patch {patch[0]},{patch[1]}: {listed}")
    print(f"wrote {output}: {k_num} positives each of {len(patches)} of {grid[0]}×{grid[1]} patches")


def add_attention(subparsers) -> None:
    parser = subparsers.add_parser("attention", help="the class token's attention, one map per head")
    add_model_and_image(parser, "attention.png")
    parser.add_argument("--patch", type=row_column, metavar="ROW,COLUMN",
                        help="draw this patch's attention in the backbone's last block, not the class token's")
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
    sequence = find_sequence(args.davis_path, name, allow_gaps=True)
    masks = [[Path(folder) / name / f"{frame.stem}.png" for frame in sequence.frames] for folder in args.results]
    for path in (path for paths in masks for path in paths if not path.is_file()):
        raise DataError(f"{path}: no result for this frame")

    def pictures():
        for frame, *paths in tqdm(zip(sequence.frames, *masks, strict=True), name, len(sequence.frames)):
            panels = [np.asarray(load_rgb(frame))]
            for path in paths:
                mask, palette = read_mask(path)
                if mask.shape != panels[0].shape[:2]:
                    raise DataError(f"{path}: is {mask.shape[1]}×{mask.shape[0]}, not of its frame's size")
                panels.append(overlays.overlay(panels[0], mask, palette))
            yield overlays.side_by_side(panels, ["video", *labels], args.width)

    overlays.write_video(pictures(), output, args.fps)
    print(f"wrote {output}: {len(sequence.frames)} frames of {name}")


def draw_scores(args: argparse.Namespace) -> None:
    labels, output = result_labels(args), check_output(args.output, args.overwrite)
    scores = [davis_metrics.score_folder(args.davis_path, folder, args.set, args.processes) for folder in args.results]
    groups = {"all objects": [davis_metrics.summarise(one)[0]["J&F-Mean"] for one in scores]}
    for name in scores[0]:
        groups[name] = [float(np.mean(one[name])) for one in scores]  # J and F of all its objects and frames
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
    parser.set_defaults(func=draw_scores)


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Pictures of what a model has learnt")
    subparsers = parser.add_subparsers(required=True, metavar="{attention,positives,overlay,scores}")
    add_attention(subparsers)
    add_positives(subparsers)
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
