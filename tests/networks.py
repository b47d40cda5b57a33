"""Small networks for tests that need no figures of the published one."""
import argparse
from functools import partial

import torch
from golden_rules import set_weights

from selfpatch.method.losses import DINOLoss
from selfpatch.method.optim import build_optimizer
from selfpatch.method.selfpatch_head import MultiCropWrapper, SelfPatchHead
from selfpatch.method.training_run import Schedules, TrainingRun
from selfpatch.method.vision_transformer import ARCHS, DINOHead, VisionTransformer, vit_tiny


def small_wrapper(patch_size=8, use_bn=False, drop_path_rate=0.0, use_patches=True, depth=2):
    """A MultiCropWrapper 24 wide, of 12 image and 10 patch prototypes, for crops of 32 pixels."""
    backbone = VisionTransformer(32, patch_size, embed_dim=24, depth=depth, num_heads=3, drop_path_rate=drop_path_rate)
    heads = (DINOHead(24, out_dim, use_bn, hidden_dim=16, bottleneck_dim=8) for out_dim in (12, 10))
    return MultiCropWrapper(backbone, SelfPatchHead(24, 3), *heads, use_patches)


def constant_run(student, teacher, dino_loss: DINOLoss, optimizer="sgd", lr=0.1, weight_decay=0.0, momentum=0.9,
                 steps_per_epoch=1, freeze_last_layer=0, **kwargs) -> TrainingRun:
    """A TrainingRun whose schedules are constants."""
    if isinstance(optimizer, str):
        optimizer = build_optimizer(student, optimizer)
    schedules = Schedules(10, steps_per_epoch, lambda _: lr, lambda _: weight_decay, lambda _: momentum)
    return TrainingRun(student, teacher, dino_loss, optimizer, schedules, freeze_last_layer=freeze_last_layer, **kwargs)


def shrink_job(patch, width=24, depth=3, hidden_dim=32, bottleneck_dim=16):
    """Give the pretraining job a narrow, shallow vit_tiny and narrow heads, by a MonkeyPatch."""
    patch.setitem(ARCHS, "vit_tiny", partial(VisionTransformer, embed_dim=width, depth=depth, num_heads=3))
    small = {"hidden_dim": hidden_dim, "bottleneck_dim": bottleneck_dim}
    patch.setattr("selfpatch.method.training_run.DINOHead", lambda *args, **kwargs: DINOHead(*args, **kwargs | small))


def assert_same(ours, other, where="checkpoint"):
    """Equal to the bit, through dicts and lists."""
    assert type(ours) is type(other), where
    if isinstance(ours, dict):
        assert ours.keys() == other.keys(), where
        for key in ours:
            assert_same(ours[key], other[key], f"{where}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(other), where
        for i, (a, b) in enumerate(zip(ours, other, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, other), where
    else:
        assert ours == other, where


def save_selfpatch_run(path):
    """A checkpoint of vit_tiny trained with 2 positives for 7 epochs."""
    wrapper = MultiCropWrapper(vit_tiny(), SelfPatchHead(192, 3, 2), DINOHead(192, 8), DINOHead(192, 8))
    set_weights(wrapper, 0)
    torch.save({"teacher": wrapper.state_dict(), "epoch": 7, "args": argparse.Namespace(k_num=2)}, path)
    return path
