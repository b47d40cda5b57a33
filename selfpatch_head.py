"""The names that users of SelfPatch import from here, also in pickles; the code is in selfpatch/method/."""
from selfpatch.method.selfpatch_head import ClassAttention, ClassAttentionBlock, MultiCropWrapper, SelfPatchHead  # noqa: F401
