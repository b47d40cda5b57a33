"""SelfPatch's backbone as mmseg's segmenters take it, and ADE20K's annotations read with their ids checked.

    from segmentation import backbone    # registers SelfPatchViT and LoadADEAnnotations with mmseg
"""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmseg.datasets import LoadAnnotations
from mmseg.registry import MODELS, TRANSFORMS
from PIL import Image

from checkpoints import from_mmseg_names
from openmmlab import load_pretrained
from utils import fail
from vision_transformer import VisionTransformer

ADE20K_CLASSES = 150


def resize_pos_embed(pos_embed: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Position embedding [1, (1 +) n·n, D], with or without a class token's, for a rows × columns grid of patches."""
    side = int(pos_embed.shape[1] ** 0.5)
    cls, pos = pos_embed[:, :pos_embed.shape[1] - side * side], pos_embed[:, -side * side:]
    pos = pos.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    pos = F.interpolate(pos, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([cls, pos.flatten(2).transpose(1, 2)], dim=1)


@MODELS.register_module()
class SelfPatchViT(VisionTransformer):
    """The backbone with four taps, for mmseg.

    Args:
        img_size: side in pixels of the training crops; the position embedding is kept resized to them.
        out_indices: blocks (from 0) whose outputs are returned.
        init_cfg: dict(type='Pretrained', checkpoint=…), what --pretrained sets.
        kwargs: VisionTransformer's own: patch_size, embed_dim, num_heads, drop_path_rate, class_token (DINO's).

    State dicts come in under our names or under those of mmseg's VisionTransformer, as released segmenters have them.
    """

    def __init__(self, img_size: int = 512, out_indices: Sequence[int] = (2, 5, 8, 11), init_cfg: dict | None = None,
                 **kwargs):
        super().__init__(img_size, **kwargs)
        self.grid = (img_size // self.patch_size,) * 2
        self.out_indices, self.init_cfg = tuple(out_indices), init_cfg
        self.register_load_state_dict_pre_hook(accept_mmseg_names)

    def init_weights(self) -> None:
        """Start from the checkpoint of init_cfg, its position embedding resized once; mmengine calls this."""
        if self.init_cfg is not None:
            load_pretrained(self, self.init_cfg, self._resized)

    def _resized(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return state | {"pos_embed": resize_pos_embed(state["pos_embed"], self.grid)}

    def interpolate_pos_encoding(self, grid: tuple[int, int]) -> torch.Tensor:
        """As in pretraining, but resized by size, as mmseg does, not by a scale factor with 0.1 added."""
        pos = self.pos_embed if grid == self.grid else resize_pos_embed(self.pos_embed, grid)
        return pos[:, -grid[0] * grid[1]:]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Images [B, 3, H, W] -> a map [B, D, ⌈H/p⌉, ⌈W/p⌉] for each tap, all at the patch size's stride."""
        x = F.pad(x, (0, -x.shape[-1] % self.patch_size, 0, -x.shape[-2] % self.patch_size))  # mmseg's "corner"
        taps = self.get_intermediate_layers(x, self.out_indices)
        return tuple(tap.transpose(1, 2).unflatten(2, self.grid_size(x)).contiguous() for tap in taps)


def accept_mmseg_names(module: torch.nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Bring what stands under prefix from mmseg's names to ours; a hook before state dicts are loaded."""
    own = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    if any(name.startswith(f"{prefix}layers.") for name in own):
        for name in own:
            del state_dict[name]
        renamed = from_mmseg_names({name.removeprefix(prefix): tensor for name, tensor in own.items()})
        state_dict.update({prefix + name: tensor for name, tensor in renamed.items()})


def check_widths(cfg: Config) -> None:
    """End the job in one line unless backbone, neck and heads of a config are made for each other's widths."""
    model = cfg.model
    joints = {"model.neck.in_channels": (model.neck.in_channels, model.backbone.embed_dim),
              "model.decode_head.in_channels": (model.decode_head.in_channels, model.neck.out_channels)}
    if "auxiliary_head" in model:
        joints["model.auxiliary_head.in_channels"] = ([model.auxiliary_head.in_channels], model.neck.out_channels)
    for option, (widths, width) in joints.items():
        if any(w != width for w in widths):
            fail(f"{option} is {widths}, but the maps that come in are {width} wide: set it with --cfg-options")


class AnnotationError(ValueError):
    """An annotation that cannot be trained on, and why, in one line for the user."""


@contextmanager
def annotation_errors() -> Iterator[None]:
    """End the job in one line at the first annotation that is refused, by a worker process of the loader too."""
    try:
        yield
    except AnnotationError as error:  # from a worker it comes with a traceback before the line
        fail(str(error).splitlines()[-1].split("AnnotationError: ")[-1], every_rank=True)


@TRANSFORMS.register_module()
class LoadADEAnnotations(LoadAnnotations):
    """mmseg's LoadAnnotations, which refuses what would train on wrong labels or stop in the midst of a loss.

    Raises:
        AnnotationError: no 8-bit image of the photograph's size, or one with ids above 150 (255 is ignored, like 0).
    """

    def _load_seg_map(self, results: dict) -> None:
        path, image_size = results["seg_map_path"], results["ori_shape"]
        try:
            with Image.open(path) as image:
                mode, size = image.mode, (image.height, image.width)
            super()._load_seg_map(results)
        except OSError as error:
            raise AnnotationError(f"{path} cannot be read ({error}), the annotation of {results['img_path']}") from None
        if mode not in ("L", "P"):  # the full ADE20K has RGB files; 16 bits would be cut to 8
            raise AnnotationError(f"{path} has mode {mode}: annotations are 8-bit images of ids, as in "
                                  "ADEChallengeData2016")
        if size != tuple(image_size):
            raise AnnotationError(f"{path} has {size[0]} rows of {size[1]} pixels, but {results['img_path']} has "
                                  f"{image_size[0]} of {image_size[1]}: they have to be of one size")
        labels = results["gt_seg_map"]  # 0 has become 255, which is ignored, and the ids 1 to 150 now start at 0
        if (wrong := labels[(labels >= ADE20K_CLASSES) & (labels < 255)]).size:
            raise AnnotationError(f"{path} has the id {int(wrong.max()) + 1}, but ADE20K's are 0 (nothing) and 1 to "
                                  f"{ADE20K_CLASSES}: use the annotations of ADEChallengeData2016")
