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


def resize_pos_embed(pos_embed: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Interpolate a position embedding to another grid of patches.

    Args:
        pos_embed: [1, N·N, D], or [1, 1 + N·N, D] with a class token, whose embedding is kept.
        grid: rows and columns of the result.
    """
    side = int(pos_embed.shape[1] ** 0.5)
    cls, pos = pos_embed[:, :pos_embed.shape[1] - side * side], pos_embed[:, -side * side:]
    pos = pos.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    pos = F.interpolate(pos, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([cls, pos.flatten(2).transpose(1, 2)], dim=1)


@MODELS.register_module()
class SelfPatchViT(VisionTransformer):
    """Vision Transformer that returns the feature maps of several blocks, for mmseg.

    It loads state dicts with this project's names or those of mmseg's VisionTransformer, as in released segmenters.

    Args:
        img_size: side in pixels of the training crops, which the position embedding is made for.
        out_indices: blocks (from 0) whose outputs are returned.
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
        """Load the checkpoint of init_cfg, if any, and resize its position embedding once; called by mmengine."""
        if self.init_cfg is not None:
            load_pretrained(self, self.init_cfg, self._resize_pos_embed)

    def _resize_pos_embed(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return state | {"pos_embed": resize_pos_embed(state["pos_embed"], self.grid)}

    def interpolate_pos_encoding(self, grid: tuple[int, int]) -> torch.Tensor:
        """As in pretraining, but interpolated to a size, as in mmseg, rather than by a scale factor with 0.1 added."""
        pos = self.pos_embed if grid == self.grid else resize_pos_embed(self.pos_embed, grid)
        return pos[:, -grid[0] * grid[1]:]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Images [B, 3, H, W] -> a map [B, D, ⌈H/p⌉, ⌈W/p⌉] for each of out_indices, all at stride p."""
        # pad at the bottom and right, mmseg's "corner" padding
        x = F.pad(x, (0, -x.shape[-1] % self.patch_size, 0, -x.shape[-2] % self.patch_size))
        features = self.get_intermediate_layers(x, self.out_indices)
        return tuple(tokens.transpose(1, 2).unflatten(2, self.grid_size(x)).contiguous() for tokens in features)


def convert_mmseg_names(module: torch.nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """load_state_dict pre-hook that renames mmseg's keys under prefix to this project's, in place."""
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


class AnnotationError(ConfigError):
    """An annotation that cannot be used for training; the message is one line for the user.

    A DataLoader re-raises the error of a worker with the worker's traceback as its message; only the line is kept.
    """

    def __init__(self, message: str):
        super().__init__(message.splitlines()[-1].split("AnnotationError: ")[-1], every_rank=True)


@TRANSFORMS.register_module()
class LoadADEAnnotations(LoadAnnotations):
    """mmseg's LoadAnnotations, with checks for files that would give wrong labels or make the loss fail.

    Raises:
        AnnotationError: not an 8-bit image of the photograph's size, a lossy one, or one with ids above 150 (255, like
            0, is ignored).
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
