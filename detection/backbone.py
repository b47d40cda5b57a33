"""SelfPatch's backbone as mmdet's detectors take it: four taps, brought to strides 4, 8, 16 and 32.

    from detection import backbone    # registers ViTPyramid and CategoriesHook with mmdet
"""
from collections.abc import Sequence

import torch
from mmcv.cnn import build_norm_layer
from mmdet.registry import HOOKS, MODELS
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from openmmlab import load_pretrained
from utils import fail
from vision_transformer import VisionTransformer


def double(dim: int) -> nn.ConvTranspose2d:
    """Maps [B, dim, H, W] to twice the height and width."""
    return nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)


@MODELS.register_module()
class ViTPyramid(VisionTransformer):
    """The backbone and what resizes its taps, fpn1 to fpn4, for mmdet's FPN.

    Args:
        img_size: side in pixels that the position embedding is laid out for; it is resized for every input as in
            pretraining, by a scale factor with 0.1 added.
        patch_size: 16 or 8.
        out_indices: blocks (from 0) whose outputs are returned, for strides 4, 8, 16 and 32.
        norm_cfg: the norm between fpn1's two convolutions.
        init_cfg: dict(type='Pretrained', checkpoint=…), what --pretrained sets.
        kwargs: VisionTransformer's own: embed_dim, num_heads, drop_path_rate, class_token (DINO's).
    """

    def __init__(self, img_size: int = 224, patch_size: int = 16, out_indices: Sequence[int] = (3, 5, 7, 11),
                 norm_cfg: dict | None = None, init_cfg: dict | None = None, **kwargs):
        super().__init__(img_size, patch_size, **kwargs)
        self.out_indices, self.init_cfg = tuple(out_indices), init_cfg
        dim = self.embed_dim
        if patch_size == 16:
            norm = build_norm_layer(norm_cfg or {"type": "SyncBN"}, dim)[1]
            self.fpn1 = nn.Sequential(double(dim), norm, nn.GELU(), double(dim))
            self.fpn2 = nn.Sequential(double(dim))
            self.fpn3, self.fpn4 = nn.Identity(), nn.MaxPool2d(2)
        elif patch_size == 8:
            self.fpn1 = nn.Sequential(double(dim))
            self.fpn2, self.fpn3, self.fpn4 = nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(4)
        else:
            raise ValueError(f"patch_size {patch_size}: strides 4 to 32 are made from patches of 16 or 8 pixels")

    def init_weights(self) -> None:
        """Start from the checkpoint of init_cfg; mmengine calls this."""
        if self.init_cfg is not None:
            load_pretrained(self, self.init_cfg)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Images [B, 3, H, W], padded to 32 by mmdet -> maps [B, D, H/s, W/s] for s = 4, 8, 16, 32."""
        taps = self.get_intermediate_layers(x, self.out_indices)
        maps = [tap.transpose(1, 2).unflatten(2, self.grid_size(x)) for tap in taps]
        resize = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return tuple(fpn(tap.contiguous()) for fpn, tap in zip(resize, maps, strict=True))


def check_widths(cfg: Config) -> None:
    """End the job in one line unless a config's neck takes the backbone's width."""
    width, widths = cfg.model.backbone.embed_dim, list(cfg.model.neck.in_channels)
    if widths != [width] * 4:
        fail(f"model.neck.in_channels is {widths}, but the backbone's four maps are {width} wide: set it with "
             f"--cfg-options 'model.neck.in_channels={str([width] * 4).replace(' ', '')}'")


@HOOKS.register_module()
class CategoriesHook(Hook):
    """End the job where a COCO file lacks some of the classes: mmdet would shift the labels of the others silently."""

    def _check(self, dataset: Dataset) -> None:
        while hasattr(dataset, "dataset"):  # RepeatDataset and the like hold the real one
            dataset = dataset.dataset
        found, wanted = len(dataset.cat_ids), len(dataset.metainfo["classes"])
        if found != wanted:
            fail(f"{dataset.ann_file} lists {found} of the {wanted} categories of COCO: it has to list all of them, "
                 "those without an object too")

    def before_train(self, runner: Runner) -> None:
        self._check(runner.train_dataloader.dataset)
        if runner.val_loop is not None:  # now, not after an epoch
            self._check(runner.val_dataloader.dataset)

    def before_val(self, runner: Runner) -> None:
        self._check(runner.val_dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        self._check(runner.test_dataloader.dataset)
