"""A small network for tests that need no figures of the published one."""
from selfpatch_head import MultiCropWrapper, SelfPatchHead
from vision_transformer import DINOHead, VisionTransformer


def small_wrapper(patch_size=8, use_bn=False, drop_path_rate=0.0):
    """A MultiCropWrapper 24 wide, 2 deep, of 12 image and 10 patch prototypes, for crops of 32 pixels."""
    backbone = VisionTransformer(32, patch_size, embed_dim=24, depth=2, num_heads=3, drop_path_rate=drop_path_rate)
    heads = (DINOHead(24, out_dim, use_bn, hidden_dim=16, bottleneck_dim=8) for out_dim in (12, 10))
    return MultiCropWrapper(backbone, SelfPatchHead(24, 3), *heads)
