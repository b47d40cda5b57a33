"""Checkpoints that are refused: the message lists what is wrong, and nothing that a file carries is run."""
import argparse
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch

from checkpoint_files import CheckpointError, read_checkpoint
from checkpoints import load_backbone, read_backbone
from vision_transformer import vit_tiny


@pytest.fixture
def state():
    with torch.device("meta"):
        shapes = vit_tiny().state_dict()
    return {name: torch.zeros(tensor.shape) for name, tensor in shapes.items()}


@pytest.mark.parametrize("change, expected", [
    (lambda s: s.pop("blocks.3.attn.qkv.bias"), r"missing \(1\): blocks.3.attn.qkv.bias"),
    (lambda s: s.pop("pos_embed"), "no Vision Transformer: missing pos_embed; it has"),
    (lambda s: s.update({"blocks.12.norm1.weight": torch.zeros(192)}), r"left over \(1\): blocks.12.norm1.weight"),
    (lambda s: s.update({"mask_token": torch.zeros(1, 1, 192)}), r"left over \(1\): mask_token"),
    (lambda s: s.update({"blocks.0.mlp.fc1.bias": torch.zeros(7)}),
     r"of another shape \(1\): blocks.0.mlp.fc1.bias \[7\] not \[768\]"),
    (lambda s: s.update({"pos_embed": torch.zeros(1, 197, 192)}), r"pos_embed is \[1, 197, 192\], without class token"),
    (lambda s: s.update({"patch_embed.proj.weight": torch.zeros(100, 3, 16, 16)}), "D one of 192, 384, 768"),
    (lambda s: s["blocks.1.norm2.bias"].fill_(float("nan")), r"with NaN or infinite values \(1\): blocks.1.norm2.bias"),
    (lambda s: s.update({"blocks.1.norm2.bias": torch.zeros(192, dtype=torch.int8)}), "not of floating point"),
])
def test_wrong_keys_are_listed(tmp_path, state, change, expected):
    change(state)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in state.items()}}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=expected):
        load_backbone(tmp_path / "file.pth")


def test_everything_wrong_is_said_at_once(tmp_path, state):
    for block in range(2):
        del state[f"blocks.{block}.norm1.bias"]
    torch.save(state | {"extra": torch.zeros(1), "blocks.5.norm1.bias": torch.zeros(1)}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"missing \(2\): blocks.0.norm1.bias, blocks.1.norm1.bias; "
                                              r"left over \(1\): extra; of another shape \(1\): blocks.5.norm1.bias"):
        load_backbone(tmp_path / "file.pth")


@pytest.mark.parametrize("content, expected", [
    (b"", "is empty"),
    (b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>", "is an HTML page.*download it again"),
    (b"\n  <HTML>quota exceeded</HTML>", "is an HTML page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "text file that begins 'version https://git-lfs"),
    (b'{"abcd": {"not": "safetensors"}}', "is a text file"),
    (bytes(range(256)) * 4, "damaged, cut off or no checkpoint"),
    (b"PK\x03\x04" + bytes(100), "is cut off"),
    (pickle.dumps([1, 2]), "is a plain pickle"),
])
def test_files_that_are_no_checkpoints(tmp_path, content, expected):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"file.pth .*{expected}") as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, options", [("new.pth", {}), ("old.pth", {"_use_new_zipfile_serialization": False}),
                                           ("file.safetensors", None)])
@pytest.mark.parametrize("part", [0.3, 0.9, 0.9999])
def test_truncated_files(tmp_path, state, name, options, part):
    path = tmp_path / name
    if options is None:
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, **options)
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * part)])
    with pytest.raises(CheckpointError, match=f"{name} is .*cut off"):
        load_backbone(path)


@pytest.mark.parametrize("length", [0x80, 0x3c, 0x4b50])
def test_safetensors_whose_header_length_looks_like_another_format(tmp_path, length):
    """0x80 is a pickle's first byte, 0x3c is <, 0x4b50 is the zip's PK."""
    path, length = tmp_path / "file.safetensors", length + (0x100 if length < 0x100 else 0)
    data = safetensors.torch.save({"a": torch.ones(2)})
    header = data[8:8 + int.from_bytes(data[:8], "little")].rstrip()
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + bytes(torch.ones(2).numpy().data))
    assert torch.equal(read_checkpoint(path)["a"], torch.ones(2))


def test_no_file_a_folder_and_no_dictionary(tmp_path):
    with pytest.raises(CheckpointError, match="none.pth cannot be read: No such file"):
        load_backbone(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        load_backbone(tmp_path)
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        load_backbone(tmp_path / "list.pth")


class Payload:
    """Unpickled without care, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: {"teacher": {}, "args": argparse.Namespace(arch=p)}])
def test_payload_of_a_pickle_does_not_run(tmp_path, zipped, wrap):
    path, made = tmp_path / "evil.pth", tmp_path / "made"
    torch.save(wrap(Payload(made)), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"evil.pth is refused: .* import \w+.mkdir"):
        load_backbone(path)
    assert not made.exists()
    torch.load(path, weights_only=False)
    assert made.exists()  # so the payload was live


def test_bare_pickle_with_a_payload(tmp_path):
    made = tmp_path / "made"
    for protocol in (0, 2, 4):
        (tmp_path / "evil.pth").write_bytes(pickle.dumps(Payload(made), protocol))
        with pytest.raises(CheckpointError):
            load_backbone(tmp_path / "evil.pth")
        assert not made.exists()


def test_key_that_is_not_there_lists_those_that_are(tmp_path, state):
    torch.save({"student": state, "epoch": 1}, tmp_path / "run.pth")
    with pytest.raises(CheckpointError, match="no network 'teacher': it has student, epoch"):
        load_backbone(tmp_path / "run.pth")
    torch.save(state, tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match="no network 'student': it has one network"):
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
    with pytest.raises(CheckpointError, match="no model in classy_state_dict"):
        load_backbone(tmp_path / "vissl.pth")


@pytest.mark.parametrize("spoil, says", [
    (lambda s: {f"module.{k}": v for k, v in s.items()} | s, "with and without module."),
    (lambda s: s | {"layers.0.ln1.weight": s["blocks.0.norm1.weight"]}, "under mmseg's names and under ours"),
    (lambda s: {f"backbone.{k}": v for k, v in s.items()} | {"blocks.99.norm1.bias": torch.zeros(1)},
     "second backbone.*blocks.99"),
    (lambda s: s | {"pos_embed": s["pos_embed"].to_sparse()}, "sparse or hold no values: pos_embed"),
    (lambda s: s | {"patch_embed.proj.weight": torch.zeros(192, 3, 0, 0)}, "patch_embed.proj.weight is")])
def test_ambiguous_or_odd_tensors(tmp_path, spoil, says):
    torch.save(spoil(vit_tiny().state_dict()), tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=says):
        read_backbone(tmp_path / "file.pth")


def test_empty_path():
    with pytest.raises(CheckpointError, match="empty"):
        read_backbone("")


@pytest.mark.parametrize("k_num", [9, "four"])
def test_k_num_of_the_file_is_checked(tmp_path, k_num):
    torch.save({"teacher": vit_tiny().state_dict(), "args": {"k_num": k_num}}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="k_num"):
        _ = read_backbone(tmp_path / "file.pth")[1].k_num
