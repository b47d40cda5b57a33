"""The options that choose the backbones of a job, and the networks they stand for."""
import argparse
import contextlib
import os
import sys
from typing import NamedTuple

import torch

from selfpatch.checkpoints.backbones import PREFIX, Backbone, check_layer
from selfpatch.checkpoints.loading import CheckpointInfo, build_head, load_with_info
from selfpatch.checkpoints.published import FORMS, download_first
from selfpatch.distributed.precision import DTYPES
from selfpatch.distributed.processes import is_main_process, together
from selfpatch.errors import POSITIVE_INT, ConfigError
from selfpatch.evaluation.image_features import ImageFeature
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
                        help=FORMS + ("; several give one table" * several))
    parser.add_argument("--checkpoint_key", default="teacher", help="network of a training run: teacher or student")
    parser.add_argument("--arch", type=arch_name, default=[] if several else None, **(many and {"nargs": "+"}),
                        help=f"{', '.join(ARCHS)}, or {PREFIX}NAME for a Vision Transformer of timm; default: the "
                             "checkpoint's own; vit_small without one"
                             + ("; one for all checkpoints, or one for each" * several))
    parser.add_argument("--patch_size", type=POSITIVE_INT, help="default: the checkpoint's own; 16 without one")
    parser.add_argument("--random_weights", action="store_true",
                        help="an untrained network" + (", as a baseline beside the checkpoints or by itself" if several
                                                       else ", without a checkpoint"))
    parser.add_argument("--layer", type=int, default=-1,
                        help="block that the features are taken from: 0 is the first, -1 the last; the final norm, if "
                             "any, is applied to each")


def add_device_options(parser: argparse.ArgumentParser, note: str = "") -> None:
    """Add --device and --precision, with a note on the latter in its help."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; auto is a GPU if there is one")
    parser.add_argument("--precision", default="fp32", choices=["auto", *DTYPES],
                        help="of the backbone; fp32 (or auto) on every device, as in the reference programs; bf16 is "
                             "faster on GPUs of compute capability 8.0 or more, and changes figures a little" + note)


class Candidate(NamedTuple):
    """A network to evaluate, in eval mode, with its name in the table and its SelfPatch head, if any."""
    name: str
    model: Backbone
    info: CheckpointInfo | None  # of its file; None for untrained networks and timm's
    path: str = ""
    arch: str = ""
    head: SelfPatchHead | None = None

    def summary(self) -> dict:
        """The network's entries in a JSON file."""
        return {"name": self.name, "path": self.path, "arch": self.arch, "patch_size": self.model.patch_size}

    def image_feature(self, kind: str | None, layer: int, dtype: torch.dtype) -> ImageFeature:
        """The network's ImageFeature.

        Raises:
            ConfigError: the network does not offer that kind; the message names the network.
        """
        try:
            return ImageFeature(self.model, kind, layer, self.head, dtype)
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from None


def load_candidates(weights: list[str], archs: list[str] = (), key: str = "teacher", patch_size: int | None = None,
                    layer: int = -1, seed: int | None = None, with_heads: bool = False) -> list[Candidate]:
    """The networks of add_model_options(several=True) on the CPU, an untrained one last.

    Every process calls it; the first one prints a line about each network.

    Args:
        weights: of published.resolve_path.
        archs: one for all files, one for each, or none: the files' own.
        key: network of a training run: teacher or student.
        patch_size: None for the files' own.
        layer: block that the features will be taken from.
        seed: of an untrained network's weights; None leaves that network out.
        with_heads: also load the SelfPatch heads of the files that have one.

    Raises:
        ConfigError: no network is asked for, one cannot be loaded, or one has no such layer; all processes raise it.
    """
    def load() -> list[Candidate]:
        if not weights and seed is None:
            raise ConfigError("--pretrained_weights is empty, so the features would be those of a random network: give "
                              "a checkpoint, or --random_weights to run without one")
        if len(archs) not in (0, 1, len(weights)):
            raise ConfigError(f"--arch has {len(archs)} names for {len(weights)} files of --pretrained_weights: give "
                              "one for all, or one for each")
        each = archs if weights and len(archs) == len(weights) else (list(archs) or [None]) * max(len(weights), 1)
        found = []
        for path, arch, name in zip(weights, each, row_names(weights), strict=False):
            model, info = load_with_info(path, key, arch, patch_size)
            head = build_head(info) if with_heads and info and info.has_selfpatch_head else None
            found.append(Candidate(name, model, info, path, info.arch if info else arch, head))
        if seed is not None:
            found.append(build_untrained(found, each[0], patch_size, seed))
        for candidate in found:
            check_layer(candidate.model, layer)
        return found

    download_first(weights)
    with contextlib.redirect_stdout(sys.stdout if is_main_process() else None):
        return together(load)


def build_untrained(found: list[Candidate], arch: str | None, patch_size: int | None, seed: int) -> Candidate:
    """An untrained network as a baseline, built like the first of the found ones with a SelfPatch head.

    It gets such a head too, so that the same feature is compared. If none has a head, it is built like the first.

    Args:
        found: networks to compare it with; may be empty.
        arch, patch_size: used if found is empty or its first network is timm's.
        seed: of its weights.
    """
    like, parts = next((one for one in found if one.head), found[0] if found else None), {}
    if like and (info := like.info):
        arch, patch_size = info.arch, info.patch_size
        parts = {"class_token": info.class_token, "final_norm": info.final_norm, "img_size": info.grid * patch_size,
                 "num_heads": like.model.num_heads}
    torch.manual_seed(seed)
    model, _ = load_with_info("", arch=arch, patch_size=patch_size, random_weights=True, **parts)
    head = like and like.head and SelfPatchHead(model.embed_dim, model.num_heads, like.head.k_num).eval()
    return Candidate("random", model, None, "", arch or "vit_small", head)


def check_image_size(image_size: int, candidates: list[Candidate]) -> None:
    """Raise ConfigError for images smaller than a network's patch, or with a side of more than 8192 pixels."""
    if image_size > LARGEST_IMAGE:
        raise ConfigError(f"--image_size {image_size}: give {LARGEST_IMAGE} or less")
    for candidate in candidates:
        if image_size < candidate.model.patch_size:
            raise ConfigError(f"--image_size {image_size} is smaller than a patch of {candidate.name}: give "
                              f"{candidate.model.patch_size} or more")


def row_names(paths: list[str]) -> list[str]:
    """Short names that tell the files apart: as many of the last parts of their paths as that takes."""
    parts = [os.path.normpath(path).split(os.sep) for path in paths]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = [os.sep.join(part[-count:]) for part in parts]
        if len({*names, "random"}) == len(names) + 1:  # "random" is the untrained network's
            return names
    return tell_apart(paths, ["random"])
