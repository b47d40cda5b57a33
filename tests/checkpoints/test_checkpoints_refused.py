"""Invalid checkpoints are refused with a message that lists what is wrong, and no code in a file is executed."""
import argparse
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from selfpatch.checkpoints.files import CheckpointError, read_checkpoint
from selfpatch.checkpoints.loading import build_head, load_backbone, read_backbone
from selfpatch.method.vision_transformer import vit_tiny


@pytest.fixture(scope="module")
def empty_state():
    """A ViT-Ti's state dict of expanded scalars, of which torch.save writes one number each."""
    with torch.device("meta"):
        shapes = vit_tiny().state_dict()
    return {name: torch.zeros(()).expand(tensor.shape) for name, tensor in shapes.items()}


@pytest.fixture
def state(empty_state):
    return dict(empty_state)


@pytest.mark.parametrize("change, expected", [
    (lambda s: s.pop("blocks.3.attn.qkv.bias"), r"missing \(1\): blocks.3.attn.qkv.bias"),
    (lambda s: s.pop("pos_embed"), "no Vision Transformer: missing pos_embed; it has"),
    (lambda s: s.update({"blocks.12.norm1.weight": torch.zeros(192)}), r"unexpected \(1\): blocks.12.norm1.weight"),
    (lambda s: s.update({"some_token": torch.zeros(1, 1, 192)}), r"unexpected \(1\): some_token"),
    (lambda s: s.update({"blocks.0.mlp.fc1.bias": torch.zeros(7)}),
     r"wrong shape \(1\): blocks.0.mlp.fc1.bias is \[7\], expected \[768\]"),
    (lambda s: s.update({"pos_embed": torch.zeros(1, 197, 192)}), r"pos_embed is \[1, 197, 192\], without class token"),
    (lambda s: s.update({"patch_embed.proj.weight": torch.zeros(100, 3, 16, 16)}), "D one of 96, 192, 384, 768"),
    (lambda s: s.update({"blocks.1.norm2.bias": torch.full((192,), torch.nan)}),
     r"NaN or infinite values \(1\): blocks.1.norm2.bias"),
    (lambda s: s.update({"blocks.1.norm2.bias": torch.zeros(192, dtype=torch.int8)}), "not floating point"),
])
def test_wrong_keys_are_listed(tmp_path, state, change, expected):
    change(state)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in state.items()}}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=expected):
        load_backbone(tmp_path / "file.pth")


def test_all_errors_are_listed_at_once(tmp_path, state):
    for block in range(2):
        del state[f"blocks.{block}.norm1.bias"]
    torch.save(state | {"extra": torch.zeros(1), "blocks.5.norm1.bias": torch.zeros(1)}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"missing \(2\): blocks.0.norm1.bias, blocks.1.norm1.bias; "
                                              r"unexpected \(1\): extra; wrong shape \(1\): blocks.5.norm1.bias"):
        load_backbone(tmp_path / "file.pth")


@pytest.mark.parametrize("content, expected", [
    (b"", "is empty"),
    (b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>", "is an HTML page.*download it again"),
    (b"\n  <HTML>quota exceeded</HTML>", "is an HTML page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "text file that starts with 'version https://git-lfs"),
    (b'{"abcd": {"not": "safetensors"}}', "is a text file"),
    (bytes(range(256)) * 4, "corrupt, truncated or not a checkpoint"),
    (b"PK\x03\x04" + bytes(100), "is truncated"),
    (pickle.dumps([1, 2]), "is a plain pickle"),
])
def test_files_that_are_not_checkpoints(tmp_path, content, expected):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"file.pth .*{expected}") as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, options", [("new.pth", {}), ("old.pth", {"_use_new_zipfile_serialization": False}),
                                           ("file.safetensors", None)])
@pytest.mark.parametrize("part", [0.3, 0.9, 0.9999])
def test_truncated_files(tmp_path, name, options, part):
    path, state = tmp_path / name, {f"blocks.{i}.norm1.weight": torch.zeros(10_000) for i in range(3)}
    if options is None:
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, **options)
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * part)])
    with pytest.raises(CheckpointError, match=f"{name} is .*truncated"):
        load_backbone(path)


@pytest.mark.parametrize("length", [0x80, 0x3c, 0x4b50])
def test_safetensors_whose_header_length_looks_like_another_format(tmp_path, length):
    """0x80 is the first byte of a pickle, 0x3c is <, 0x4b50 are a zip file's PK."""
    path, length = tmp_path / "file.safetensors", length + (0x100 if length < 0x100 else 0)
    data = safetensors.torch.save({"a": torch.ones(2)})
    header = data[8:8 + int.from_bytes(data[:8], "little")].rstrip()
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + bytes(torch.ones(2).numpy().data))
    assert torch.equal(read_checkpoint(path)["a"], torch.ones(2))


def test_missing_file_directory_and_non_dictionary(tmp_path):
    with pytest.raises(CheckpointError, match="none.pth cannot be read: No such file"):
        load_backbone(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        load_backbone(tmp_path)
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="contains a list"):
        load_backbone(tmp_path / "list.pth")


class Payload:
    """Creates a folder when it is unpickled without restrictions."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: {"teacher": {}, "args": argparse.Namespace(arch=p)}])
def test_pickled_code_is_not_executed(tmp_path, zipped, wrap):
    path, made = tmp_path / "evil.pth", tmp_path / "made"
    torch.save(wrap(Payload(made)), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"evil.pth is refused: .* import \w+.mkdir"):
        load_backbone(path)
    assert not made.exists()
    torch.load(path, weights_only=False)
    assert made.exists()  # the payload does work


class Getattr:
    """Pickles as getattr(owner, name)."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


@pytest.fixture
def no_registered_classes():
    """As if openmmlab/jobs.py, which registers mmengine's real class, were not imported."""
    registered = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.add_safe_globals(registered)


def test_mmengine_histories_load_as_placeholders(tmp_path, monkeypatch, no_registered_classes):
    """mmengine's training checkpoints have NumPy histories and refer to their methods through getattr."""
    class History:
        def __init__(self):
            self.values = np.arange(3.0)

    History.__module__, History.__qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer"
    with monkeypatch.context() as patch:
        for name in ("mmengine", "mmengine.logging", History.__module__):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[History.__module__].HistoryBuffer = History
        torch.save({"history": History(), "method": Getattr(History, "mean")}, tmp_path / "mmengine.pth")
        torch.save({"method": Getattr(argparse.Namespace, "__init__")}, tmp_path / "evil.pth")
    content = read_checkpoint(tmp_path / "mmengine.pth")
    assert content["method"] == "mean" and np.array_equal(content["history"].values, np.arange(3.0))
    with pytest.raises(CheckpointError, match="evil.pth is .*requires __init__ of Namespace"):
        read_checkpoint(tmp_path / "evil.pth")


def test_plain_pickles_are_not_executed(tmp_path):
    made = tmp_path / "made"
    for protocol in (0, 2, 4):
        (tmp_path / "evil.pth").write_bytes(pickle.dumps(Payload(made), protocol))
        with pytest.raises(CheckpointError):
            load_backbone(tmp_path / "evil.pth")
        assert not made.exists()


def test_missing_key_lists_those_of_the_file(tmp_path, state):
    torch.save({"student": state, "epoch": 1}, tmp_path / "run.pth")
    with pytest.raises(CheckpointError, match="no network 'teacher': it has student.$"):
        load_backbone(tmp_path / "run.pth")
    torch.save(state, tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match="no network 'student': it has a single one without a name"):
        load_backbone(tmp_path / "bare.pth", "student")


@pytest.mark.parametrize("wrap", [
    lambda s: s, lambda s: {"teacher": {f"backbone.{k}": v for k, v in s.items()}},
    lambda s: {"classy_state_dict": {"base_model": {"model": {"trunk": {f"_feature_blocks.{k}": v
                                                                        for k, v in s.items()}}}}}])
def test_resnet(tmp_path, wrap):
    torch.save(wrap({"conv1.weight": torch.zeros(64, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}),
               tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match="resnet.pth holds a ResNet"):
        load_backbone(tmp_path / "resnet.pth")


def test_vissl_without_a_trunk(tmp_path):
    torch.save({"classy_state_dict": {"base_model": {"model": torch.zeros(1)}}}, tmp_path / "vissl.pth")
    with pytest.raises(CheckpointError, match="without model in classy_state_dict"):
        load_backbone(tmp_path / "vissl.pth")


@pytest.mark.parametrize("spoil, expected", [
    (lambda s: {f"module.{k}": v for k, v in s.items()} | s, "with and without the prefix module."),
    (lambda s: s | {"layers.0.ln1.weight": s["blocks.0.norm1.weight"]}, "under mmseg's names and under this project's"),
    (lambda s: {f"backbone.{k}": v for k, v in s.items()} | {"blocks.99.norm1.bias": torch.zeros(1)},
     "second backbone.*blocks.99"),
    (lambda s: s | {"pos_embed": s["pos_embed"].to_sparse()}, "sparse, nested, quantised or without data: pos_embed"),
    (lambda s: s | {"pos_embed": torch.zeros(1, 196, 192, device="meta")}, "without data: pos_embed"),
    (lambda s: s | {"pos_embed": torch.nested.nested_tensor([torch.ones(196, 192)])}, "nested, .*: pos_embed"),
    (lambda s: s | {"blocks.1.norm1.bias": torch.quantize_per_tensor(torch.ones(192), 0.1, 0, torch.qint8)},
     "quantised .*: blocks.1.norm1.bias"),
    (lambda s: s | {"pos_embed": torch.ones(1, 196, 192, dtype=torch.complex64)}, r"not floating point \(1\): pos_emb"),
    (lambda s: s | {"patch_embed.proj.weight": torch.zeros(192, 3, 0, 0)}, "patch_embed.proj.weight is")])
def test_ambiguous_or_invalid_tensors(tmp_path, state, spoil, expected):
    torch.save(spoil(state), tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=expected):
        read_backbone(tmp_path / "file.pth")


@pytest.mark.parametrize("name, shape, expected", [
    ("pos_embed", (1, 10 ** 7, 10 ** 7), "pos_embed is"), ("pos_embed", (1, 10 ** 14, 192), "square grid of up to"),
    ("patch_embed.proj.weight", (192, 3, 10 ** 6, 10 ** 6), "p at most 224"),
    ("blocks.0.mlp.fc1.weight", (10 ** 7, 10 ** 7), "wrong shape"), ("extra", (10 ** 7, 10 ** 7), "unexpected"),
    ("blocks.0.ls1.gamma", (10 ** 7, 10 ** 7), "LayerScale"), ("blocks.0.ls1.gamma", (10 ** 14,), "LayerScale"),
    ("embeddings.patch_embeddings.projection.weight", (10 ** 7, 10 ** 7), "patch_embed.proj.weight is")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_expanded_tensors_are_not_filled_in(tmp_path, state, name, shape, expected, dtype):
    """Their shapes are checked before anything is made of them: each claims 10^14 numbers in a file of a few bytes."""
    torch.save(state | {name: torch.ones((), dtype=dtype).expand(shape)}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=expected):
        read_backbone(tmp_path / "file.pth")


def test_expanded_tensors_of_a_head(tmp_path, state):
    run = {f"backbone.{name}": tensor for name, tensor in state.items()}
    for tensor in (torch.ones((), dtype=torch.half).expand(10 ** 7, 10 ** 7), torch.ones(1, 1, 192, device="meta")):
        torch.save({"teacher": run | {"ca_head.cls_token": tensor}}, tmp_path / "file.pth")
        with pytest.raises(CheckpointError, match="the ca_head in .*file.pth does not fit"):
            build_head(read_backbone(tmp_path / "file.pth")[1])


def test_empty_path():
    with pytest.raises(CheckpointError, match="empty"):
        read_backbone("")


@pytest.mark.parametrize("k_num", [9, "four"])
def test_invalid_k_num(tmp_path, state, k_num):
    torch.save({"teacher": state, "args": {"k_num": k_num}}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="k_num"):
        _ = read_backbone(tmp_path / "file.pth")[1].k_num


@pytest.mark.parametrize("path, random_weights", [("file.pth", False), ("", True)])
def test_unknown_networks_are_named(path, random_weights):
    with pytest.raises(CheckpointError, match="^arch 'vit_smal' is neither vit_pico, .* nor timm:NAME, "):
        load_backbone(path, arch="vit_smal", random_weights=random_weights)
