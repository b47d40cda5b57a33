"""SelfPatch's backbone for mmseg's segmenters, and a validating loader of ADE20K's annotations.

    from segmentation import backbone    # registers SelfPatchViT and LoadADEAnnotations with mmseg
"""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmseg.datasets import LoadAnnotations
from mmseg.registry import MODELS, TRANSFORMS

from selfpatch.checkpoints.layouts import from_mmseg_names
from selfpatch.data.files import LOSSY_FORMATS, UnreadableImage, open_image
from selfpatch.errors import ConfigError
from selfpatch.method.vision_transformer import VisionTransformer
from selfpatch.openmmlab.jobs import load_pretrained

ADE20K_CLASSES = 150
KEEP_GRID = False  # of the position embedding, which is resized once to the training crops


def resize_pos_embed(pos_embed: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Interpolate a position embedding [1, N·N, D] to another grid of (rows, columns): [1, rows·columns, D].

    With a class token, both have one more row in front, which stays as it is.
    """
    side = int(pos_embed.shape[1] ** 0.5)
    cls, pos = pos_embed[:, :pos_embed.shape[1] - side * side], pos_embed[:, -side * side:]
    pos = pos.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    pos = F.interpolate(pos, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([cls, pos.flatten(2).transpose(1, 2)], dim=1)


@MODELS.register_module()
class SelfPatchViT(VisionTransformer):
    """Vision Transformer for mmseg, returning the feature maps of several blocks.

    Loads state dicts under this project's names, and under those of mmseg's VisionTransformer, as released segmenters
    have them.

    Args:
        img_size: side in pixels of the training crops, the size of the position embedding.
        out_indices: blocks (from 0) to return the outputs of.
        init_cfg: dict(type='Pretrained', checkpoint=…), which --pretrained sets.
        kwargs: further arguments of VisionTransformer: patch_size, embed_dim, num_heads, drop_path_rate, class_token
            (for DINO).
    """

    def __init__(self, img_size: int = 512, out_indices: Sequence[int] = (2, 5, 8, 11), init_cfg: dict | None = None,
                 **kwargs):
        super().__init__(img_size, **kwargs)
        self.grid = (img_size // self.patch_size,) * 2
        self.out_indices, self.init_cfg = tuple(out_indices), init_cfg
        self.register_load_state_dict_pre_hook(convert_mmseg_names)

    def init_weights(self) -> None:
        """Load the checkpoint of init_cfg, if any, with its position embedding resized; called by mmengine."""
        if self.init_cfg is not None:
            load_pretrained(self, self.init_cfg, self._resize_pos_embed)

    def _resize_pos_embed(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return state | {"pos_embed": resize_pos_embed(state["pos_embed"], self.grid)}

    def interpolate_pos_encoding(self, grid: tuple[int, int]) -> torch.Tensor:
        """Interpolate to a size, as mmseg does; pretraining interpolates by a scale factor with 0.1 added."""
        pos = self.pos_embed if grid == self.grid else resize_pos_embed(self.pos_embed, grid)
        return pos[:, -grid[0] * grid[1]:]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Images [B, 3, H, W] -> a map [B, D, ⌈H/p⌉, ⌈W/p⌉] for each of out_indices, all at stride p."""
        # pad at the bottom and right, mmseg's "corner" padding
        x = F.pad(x, (0, -x.shape[-1] % self.patch_size, 0, -x.shape[-2] % self.patch_size))
        features = self.get_intermediate_layers(x, self.out_indices)
        return tuple(tokens.transpose(1, 2).unflatten(2, self.grid_size(x)).contiguous() for tokens in features)


def convert_mmseg_names(module: torch.nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Rename mmseg's keys under prefix to this project's, in place: a pre-hook of load_state_dict."""
    backbone = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    if any(name.startswith(f"{prefix}layers.") for name in backbone):
        for name in backbone:
            del state_dict[name]
        renamed = from_mmseg_names({name.removeprefix(prefix): tensor for name, tensor in backbone.items()})
        state_dict.update({prefix + name: tensor for name, tensor in renamed.items()})


def check_channels(cfg: Config) -> None:
    """Raise ConfigError unless the channels of a config's backbone, neck and heads match."""
    model = cfg.model
    options = {"model.neck.in_channels": (model.neck.in_channels, model.backbone.embed_dim),
               "model.decode_head.in_channels": (model.decode_head.in_channels, model.neck.out_channels)}
    if "auxiliary_head" in model:
        options["model.auxiliary_head.in_channels"] = ([model.auxiliary_head.in_channels], model.neck.out_channels)
    for option, (in_channels, expected) in options.items():
        if any(channels != expected for channels in in_channels):
            raise ConfigError(f"{option} is {in_channels}, but its input maps have {expected} channels: set it with "
                              "--cfg-options")


def show_predictions(cfg: Config, folder: str) -> None:
    """Have every test image drawn into a folder (mmseg's default: each 50th), annotation left, prediction right."""
    cfg.default_hooks.visualization.update(draw=True, interval=1)
    cfg.visualizer.vis_backends = [{"type": "LocalVisBackend", "img_save_dir": folder}]


class AnnotationError(ConfigError):
    """An annotation that training cannot use."""

    def __init__(self, message: str):
        super().__init__(message, every_rank=True)


@TRANSFORMS.register_module()
class LoadADEAnnotations(LoadAnnotations):
    """mmseg's LoadAnnotations, refusing files that would give wrong labels or make the loss fail.

    Raises:
        AnnotationError: the file cannot be read, is lossy, is not an 8-bit image of the photograph's size, or has ids
            above 150 other than 255 (which is ignored, as 0 is).
    """

    def _load_seg_map(self, results: dict) -> None:
        path, (height, width) = results["seg_map_path"], results["ori_shape"]
        try:
            image = open_image(path)
        except UnreadableImage as error:
            raise AnnotationError(f"{error}; it is the annotation of {results['img_path']}") from None
        if image.mode not in ("L", "P"):  # the full ADE20K has RGB files; 16-bit values would be truncated to 8 bits
            raise AnnotationError(f"{path} has mode {image.mode}: annotations are 8-bit images of ids, as in "
                                  "ADEChallengeData2016")
        if image.format in LOSSY_FORMATS:
            raise AnnotationError(f"{path} is a {image.format}, whose compression changes ids: use PNGs")
        if image.size != (width, height):
            raise AnnotationError(f"{path} has {image.height} rows of {image.width} pixels, but {results['img_path']} "
                                  f"has {height} of {width}: the sizes must be equal")
        super()._load_seg_map(results)
        labels = results["gt_seg_map"]  # mmseg has mapped id 0 to 255, which is ignored, and ids 1 to 150 to 0 to 149
        if (invalid := labels[(labels >= ADE20K_CLASSES) & (labels < 255)]).size:
            raise AnnotationError(f"{path} has the id {int(invalid.max()) + 1}, but ADE20K's are 0 (nothing) and 1 to "
                                  f"{ADE20K_CLASSES}: use the annotations of ADEChallengeData2016")
