"""Pictures of what a model has learnt, from any checkpoint, of its results on videos, and of how training went.

    python visualize.py attention --pretrained_weights checkpoint.pth --image_path dog.jpg --output attention.png
    python visualize.py positives --pretrained_weights checkpoint.pth --image_path dog.jpg --output positives.png
    python visualize.py positives --random_weights --arch vit_small --image_path dog.jpg --patches 10,20 4,7
    python visualize.py pca --pretrained_weights checkpoint.pth --image_path dog1.jpg dog2.jpg --output pca.png
    python visualize.py similarity --pretrained_weights checkpoint.pth --image_path dog1.jpg dog2.jpg --patch 10,20
    python visualize.py overlay --davis_path DAVIS --results masks/dino masks/selfpatch --labels DINO SelfPatch
    python visualize.py scores --davis_path DAVIS --results masks/dino masks/selfpatch --labels DINO SelfPatch
    python visualize.py curves runs/one runs/two --output curves.png

attention: the class token's attention, one map per head; SelfPatch's class token is in its head.
positives: the neighbours that positive matching picks for some patches.
pca: three principal components of the patches' features as colours, fitted over all images together.
similarity: the cosine of one patch to all patches of its image and of others.
overlay: a DAVIS sequence beside the masks of one or several folders of results, as GIF, MP4 or PNGs.
scores: J&F of such folders by sequence, as a bar chart.
curves: losses beside ln K, rates and k-NN of one or several training runs.
"""
import argparse
import os

import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from selfpatch.checkpoints.backbones import (
    Backbone,
    TimmBackbone,
    check_layer,
    image_statistics,
    load_any_with_info,
    normalise,
)
from selfpatch.checkpoints.files import CheckpointError
from selfpatch.checkpoints.loading import CheckpointInfo, build_head
from selfpatch.data.augmentations import IMAGENET_MEAN, IMAGENET_STD
from selfpatch.data.files import load_rgb, open_image, orientation
from selfpatch.errors import ArgumentParser, ConfigError, run_main
from selfpatch.evaluation.model_options import add_model_options
from selfpatch.evaluation.tables import check_png
from selfpatch.method.selfpatch_head import SelfPatchHead, neighbour_similarity, positive_matching
from selfpatch.visualization import drawing
from selfpatch.visualization import features as feature_pictures
from selfpatch.visualization.curves import add_curves
from selfpatch.visualization.drawing import fit_patches
from selfpatch.visualization.result_pictures import add_overlay, add_scores


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


def read_image(path: str) -> Image.Image:
    """The image as RGB with its pixels as stored; prints that an EXIF orientation tag is ignored, if it has one."""
    if (tag := orientation(open_image(path))) != 1:
        print(f"{path}: EXIF orientation {tag} is ignored, as in training: pixels are used as stored")
    return load_rgb(path)


def to_tensor(image: Image.Image, statistics: tuple = (IMAGENET_MEAN, IMAGENET_STD)) -> torch.Tensor:
    """A PIL image -> [1, 3, H, W], normalised with a mean and standard deviation of each channel."""
    return normalise(pil_to_tensor(image)[None], statistics)


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
    output = check_png(args.output, args.overwrite)
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
        elif info.has_selfpatch_head:
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
    output = check_png(args.output, args.overwrite)
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
    output = check_png(args.output, args.overwrite)
    _, images, features, grids = features_of_images(args)
    colours, coloured = feature_pictures.component_colours(torch.cat(features), grids, not args.all_patches)
    feature_pictures.component_panels(images, colours).save(output)
    print(f"wrote {output}: principal components of {int(coloured.sum())} of {len(coloured)} patches")


@torch.no_grad()
def draw_similarity(args: argparse.Namespace) -> None:
    output = check_png(args.output, args.overwrite)
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


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Pictures of what a model has learnt")
    subparsers = parser.add_subparsers(required=True,
                                       metavar="{attention,positives,pca,similarity,overlay,scores,curves}")
    add_attention(subparsers)
    add_positives(subparsers)
    add_pca(subparsers)
    add_similarity(subparsers)
    add_overlay(subparsers)
    add_scores(subparsers)
    add_curves(subparsers)
    return parser


def main(args: argparse.Namespace) -> None:
    try:
        args.func(args)
    except OSError as error:  # the disk: what is wrong with inputs is a ConfigError
        raise ConfigError(str(error)) from None


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
