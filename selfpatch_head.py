"""The names that users of SelfPatch import from here, for pickles too; the code is in selfpatch/method/."""
from selfpatch.method.selfpatch_head import MultiCropWrapper, SelfPatchHead  # noqa: F401
