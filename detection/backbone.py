"""SelfPatch's backbone for mmdet's detectors: four feature maps at strides 4, 8, 16 and 32.

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

from selfpatch.errors import ConfigError
from selfpatch.method.vision_transformer import VisionTransformer
from selfpatch.openmmlab.jobs import load_pretrained

KEEP_GRID = True  # of the position embedding, which forward interpolates for every image


def upsample(dim: int) -> nn.ConvTranspose2d:
    """Transposed convolution from [B, dim, H, W] to [B, dim, 2H, 2W]."""
    return nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)


@MODELS.register_module()
class ViTPyramid(VisionTransformer):
    """Vision Transformer for mmdet's FPN: fpn1 to fpn4 resample the features of four blocks to four strides.

    Args:
        img_size: side in pixels of the images of the position embedding. For each input it is interpolated as in
            pretraining, by a scale factor with 0.1 added.
        patch_size: 16 or 8.
        out_indices: blocks (from 0) that give the maps at strides 4, 8, 16 and 32.
        norm_cfg: norm layer between the two convolutions of fpn1; default: SyncBN.
        init_cfg: dict(type='Pretrained', checkpoint=…), which --pretrained sets.
        kwargs: further arguments of VisionTransformer: embed_dim, num_heads, drop_path_rate, class_token (for DINO).

    Raises:
        ConfigError: the patch size is neither 16 nor 8.
    """

    def __init__(self, img_size: int = 224, patch_size: int = 16, out_indices: Sequence[int] = (3, 5, 7, 11),
                 norm_cfg: dict | None = None, init_cfg: dict | None = None, **kwargs):
        super().__init__(img_size, patch_size, **kwargs)
        self.out_indices, self.init_cfg = tuple(out_indices), init_cfg
        dim = self.embed_dim
        if patch_size == 16:
            norm = build_norm_layer(norm_cfg or {"type": "SyncBN"}, dim)[1]
            self.fpn1 = nn.Sequential(upsample(dim), norm, nn.GELU(), upsample(dim))
            self.fpn2 = nn.Sequential(upsample(dim))
            self.fpn3, self.fpn4 = nn.Identity(), nn.MaxPool2d(2)
        elif patch_size == 8:
            self.fpn1 = nn.Sequential(upsample(dim))
            self.fpn2, self.fpn3, self.fpn4 = nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(4)
        else:
            raise ConfigError(f"patch_size {patch_size} is not supported: strides 4 to 32 need patches of 16 or 8 "
                              "pixels")

    def init_weights(self) -> None:
        """Load the checkpoint of init_cfg, if any; called by mmengine."""
        if self.init_cfg is not None:
            load_pretrained(self, self.init_cfg)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Images [B, 3, H, W], padded by mmdet to multiples of 32 -> maps [B, D, H/s, W/s] for s = 4, 8, 16, 32."""
        features = self.get_intermediate_layers(x, self.out_indices)
        maps = [tokens.transpose(1, 2).unflatten(2, self.grid_size(x)) for tokens in features]
        layers = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return tuple(layer(m.contiguous()) for layer, m in zip(layers, maps, strict=True))


def check_channels(cfg: Config) -> None:
    """Raise ConfigError unless the neck's input channels equal the backbone's embedding dimension."""
    dim, in_channels = cfg.model.backbone.embed_dim, list(cfg.model.neck.in_channels)
    if in_channels != [dim] * 4:
        raise ConfigError(
            f"model.neck.in_channels is {in_channels}, but the backbone's four maps have {dim} channels: set it with "
            f"--cfg-options 'model.neck.in_channels={str([dim] * 4).replace(' ', '')}'")


def show_predictions(cfg: Config, folder: str) -> None:
    """Have every test image drawn into a folder, annotations on the left, predictions on the right."""
    cfg.default_hooks.visualization.update(draw=True, test_out_dir=folder)


@HOOKS.register_module()
class CategoriesHook(Hook):
    """Raise ConfigError unless a COCO file lists all classes; mmdet would silently shift the labels."""

    def _check(self, dataset: Dataset) -> None:
        while hasattr(dataset, "dataset"):  # unwrap RepeatDataset and similar
            dataset = dataset.dataset
        listed, expected = len(dataset.cat_ids), len(dataset.metainfo["classes"])
        if listed != expected:
            raise ConfigError(f"{dataset.ann_file} lists {listed} of the {expected} categories of COCO: it must list "
                              "all of them, including those without objects")

    def before_train(self, runner: Runner) -> None:
        self._check(runner.train_dataloader.dataset)
        if runner.val_loop is not None:  # now rather than after an epoch
            self._check(runner.val_dataloader.dataset)

    def before_val(self, runner: Runner) -> None:
        self._check(runner.val_dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        self._check(runner.test_dataloader.dataset)
