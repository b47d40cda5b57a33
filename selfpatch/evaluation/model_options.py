"""The options that say which backbone a job evaluates, and the networks that they stand for."""
import argparse
import contextlib
import os
import sys
from typing import NamedTuple

import torch

from selfpatch.checkpoints.backbones import PREFIX, Backbone, check_layer, load_any_with_info
from selfpatch.checkpoints.loading import CheckpointInfo, build_head
from selfpatch.distributed.precision import DTYPES
from selfpatch.errors import ConfigError
from selfpatch.evaluation.tables import tell_apart
from selfpatch.method.selfpatch_head import SelfPatchHead
from selfpatch.method.vision_transformer import ARCHS

LARGEST_IMAGE = 8192  # side in pixels


def arch_name(text: str) -> str:
    """The type of the option --arch: one of ours, or timm:NAME."""
    if text not in ARCHS and not text.startswith(PREFIX):
        raise argparse.ArgumentTypeError(f"{text!r} is neither {', '.join(ARCHS)} nor {PREFIX}NAME, a network of timm")
    return text


def add_model_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Add --pretrained_weights, --checkpoint_key, --arch, --patch_size, --random_weights and --layer.

    Args:
        several: the job compares several checkpoints; --random_weights then adds an untrained network to them.
    """
    many = {"nargs": "+", "metavar": "FILE"} if several else {}
    parser.add_argument("--pretrained_weights", default=[] if several else "", type=os.path.expanduser, **many,
                        help="checkpoint of any kind, or a run's folder" + ("; several give one table" * several))
    parser.add_argument("--checkpoint_key", default="teacher", help="network of a training run: teacher or student")
    parser.add_argument("--arch", type=arch_name, default=[] if several else None, **(many and {"nargs": "+"}),
                        help=f"{', '.join(ARCHS)}, or {PREFIX}NAME for a Vision Transformer of timm; default: the "
                             "checkpoint's own; vit_small without one"
                             + ("; one for all checkpoints, or one for each" * several))
    parser.add_argument("--patch_size", type=int, help="default: the checkpoint's own; 16 without one")
    parser.add_argument("--random_weights", action="store_true",
                        help="an untrained network" + (", as a baseline beside the checkpoints or by itself" if several
                                                       else ", without a checkpoint"))
    parser.add_argument("--layer", type=int, default=-1,
                        help="block that the features are taken from: 0 is the first, -1 the last; the final norm, if "
                             "any, is applied to each")


def add_precision_option(parser: argparse.ArgumentParser, note: str = "") -> None:
    """Add --precision, with a note on it in its help."""
    parser.add_argument("--precision", default="fp32", choices=["auto", *DTYPES],
                        help="of the backbone; fp32 (or auto) on every device, as in the reference programs; bf16 is "
                             "faster on GPUs of compute capability 8.0 or more, and changes figures a little" + note)


def add_run_options(parser: argparse.ArgumentParser, batch_size: int | None) -> None:
    """Add --batch_size_per_gpu, --num_workers, --device, --precision, --seed and --dist_timeout.

    Args:
        batch_size: the default of --batch_size_per_gpu; None leaves that out.
    """
    if batch_size is not None:
        parser.add_argument("--batch_size_per_gpu", type=int, default=batch_size,
                            help="images in a forward pass of one process")
    parser.add_argument("--num_workers", type=int, default=min(10, os.cpu_count() or 1),
                        help="processes that load images, for each GPU; 0 loads them in this one")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; auto is a GPU if there is one")
    add_precision_option(parser)
    parser.add_argument("--seed", type=int, default=0, help="of random weights, crops and heads")
    parser.add_argument("--dist_timeout", type=float, default=30, help="minutes to wait for other processes")


def check_run_options(args: argparse.Namespace) -> None:
    """Raise ConfigError for numbers that no run can have."""
    for name, least in (("batch_size_per_gpu", 1), ("num_workers", 0), ("seed", 0)):
        if getattr(args, name, least) < least:
            raise ConfigError(f"--{name} {getattr(args, name)}: give {least} or more")
    if not 0 < args.dist_timeout < 1e6:
        raise ConfigError(f"--dist_timeout {args.dist_timeout:g}: give minutes, more than 0")


class Candidate(NamedTuple):
    """A network to evaluate: its name in the table, the network and its SelfPatch head, if any, in eval mode."""
    name: str
    model: Backbone
    info: CheckpointInfo | None  # of its file; None for an untrained network and for timm's
    path: str = ""
    arch: str = ""
    head: SelfPatchHead | None = None

    def summary(self) -> dict:
        """What a JSON file says about the network."""
        return {"name": self.name, "path": self.path, "arch": self.arch, "patch_size": self.model.patch_size}


def load_candidates(args: argparse.Namespace, quiet: bool = False, with_heads: bool = False) -> list[Candidate]:
    """The networks of the options (several=True) on the CPU, an untrained one last; prints a line about each.

    Args:
        with_heads: load the SelfPatch heads of the files that have one, too.

    Raises:
        ConfigError: no network is asked for, one cannot be loaded, or one has no block --layer.
    """
    weights, archs = args.pretrained_weights, args.arch
    if not weights and not args.random_weights:
        raise ConfigError("--pretrained_weights is empty, so the features would be those of a random network: give a "
                          "checkpoint, or --random_weights to run without one")
    if len(archs) not in (0, 1, len(weights)):
        raise ConfigError(f"--arch has {len(archs)} names for {len(weights)} files of --pretrained_weights: give one "
                          "for all, or one for each")
    archs = archs if len(archs) == len(weights) and weights else (archs or [None]) * max(len(weights), 1)
    found = []
    with contextlib.redirect_stdout(None if quiet else sys.stdout):
        for path, arch, name in zip(weights, archs, row_names(weights), strict=False):
            model, info = load_any_with_info(arch, path, args.checkpoint_key, args.patch_size)
            head = build_head(info) if with_heads and info and info.has_selfpatch_head else None
            found.append(Candidate(name, model, info, path, info.arch if info else arch, head))
        if args.random_weights:
            found.append(build_untrained(found, archs[0], args.patch_size, getattr(args, "seed", 0)))
    for candidate in found:
        check_layer(candidate.model, args.layer)
    return found


def build_untrained(found: list[Candidate], arch: str | None, patch_size: int | None, seed: int) -> Candidate:
    """An untrained network as the baseline of others: built like the first of them that has a SelfPatch head.

    It gets such a head as well, so that the same feature is compared. Where none has one, it is built like the first
    of all.

    Args:
        found: networks to compare it with, perhaps none.
        arch, patch_size: of the options, for where there are none or the first one is timm's.
        seed: of its weights.
    """
    like, parts = next((one for one in found if one.head), found[0] if found else None), {}
    if like and (info := like.info):
        arch, patch_size = info.arch, info.patch_size
        parts = {"class_token": info.class_token, "final_norm": info.final_norm, "img_size": info.grid * patch_size,
                 "num_heads": like.model.num_heads}
    torch.manual_seed(seed)
    model, _ = load_any_with_info(arch, "", patch_size=patch_size, random_weights=True, **parts)
    head = like and like.head and SelfPatchHead(model.embed_dim, model.num_heads, like.head.k_num).eval()
    return Candidate("random", model, None, "", arch or "vit_small", head)


def check_image_size(image_size: int, candidates: list[Candidate]) -> None:
    """Raise ConfigError if the images are smaller than a patch of one of the networks, or of more than 8192 pixels."""
    if image_size > LARGEST_IMAGE:
        raise ConfigError(f"--image_size {image_size}: give {LARGEST_IMAGE} or less")
    for candidate in candidates:
        if image_size < candidate.model.patch_size:
            raise ConfigError(f"--image_size {image_size} is smaller than a patch of {candidate.name}: give "
                              f"{candidate.model.patch_size} or more")


def row_names(paths: list[str]) -> list[str]:
    """Short names that tell the files apart: the last parts of their paths, as many as it takes."""
    parts = [os.path.normpath(path).split(os.sep) for path in paths]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = [os.sep.join(part[-count:]) for part in parts]
        if len({*names, "random"}) == len(names) + 1:  # "random" is the untrained network's
            return names
    return tell_apart(paths, ["random"])
