"""Files with the weights of one small Vision Transformer, under any names."""
import functools

import timm
import torch
from golden_rules import set_weights

from selfpatch.checkpoints.loading import read_backbone


@functools.cache
def timm_network():
    """timm's ViT-Ti with class token, norm and head, for images of 48 pixels."""
    return set_weights(timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=5), 0).eval()


def half_state():
    """Its state dict in float16, so that the files are small."""
    return {name: tensor.half() for name, tensor in timm_network().state_dict().items()}


def empty_like(state):
    """Another network of the same shapes: expanded scalars, of which torch.save writes one number each."""
    return {name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for name, tensor in state.items()}


def under(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def saved(tmp_path, content):
    torch.save(content, tmp_path / "file.pth")
    return tmp_path / "file.pth"


def assert_is(path, state, key="teacher"):
    """The backbone in the file is that of a timm state dict, to the bit; returns the metadata."""
    loaded, info = read_backbone(path, key)
    expected = {name: tensor.float() for name, tensor in state.items() if not name.startswith("head.")}
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)
    return info
