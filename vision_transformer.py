"""The names that users of DINO and SelfPatch import from here, also in pickles; the code is in selfpatch/method/."""
from selfpatch.method.vision_transformer import (  # noqa: F401
    ARCHS,
    DINOHead,
    VisionTransformer,
    WeightNormLinear,
    vit_base,
    vit_pico,
    vit_small,
    vit_tiny,
)
