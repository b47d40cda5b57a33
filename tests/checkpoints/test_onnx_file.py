"""An ONNX file gives the network's features for batches of any number; what is missing is one line."""
import importlib.util
import os

import pytest
import torch
from golden_rules import set_weights

import convert_checkpoint
from convert_checkpoint import convert_file, get_args_parser, main
from selfpatch.checkpoints import onnx_file
from selfpatch.checkpoints.files import CheckpointError
from selfpatch.checkpoints.onnx_file import check_image_size, write_onnx
from selfpatch.errors import ConfigError
from selfpatch.method.vision_transformer import VisionTransformer, vit_tiny

needs_onnx = pytest.mark.skipif(not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))),
                                reason="onnx, onnxscript or onnxruntime is not installed")


def features(path, images):
    import onnxruntime
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def small(**kwargs):
    return set_weights(VisionTransformer(64, 16, embed_dim=48, depth=2, num_heads=3, **kwargs), 0).eval()


@needs_onnx
@torch.no_grad()
def test_the_job_writes_the_features_of_the_network(tmp_path, capsys):
    source = set_weights(vit_tiny(patch_size=32), 0).eval()
    torch.save(source.state_dict(), tmp_path / "input.pth")
    main(get_args_parser().parse_args([str(tmp_path / "input.pth"), str(tmp_path / "vit.onnx"), "--to", "onnx"]))
    out = capsys.readouterr().out
    assert "images [batch, 3, rows·32, columns·32], features differ by at most" in out
    assert f"load it with: onnxruntime.InferenceSession('{tmp_path}/vit.onnx')" in out
    assert sorted(os.listdir(tmp_path)) == ["input.pth", "vit.onnx"]
    for size in ((1, 3, 224, 224), (3, 3, 96, 352)):
        x = torch.randn(size)
        torch.testing.assert_close(features(tmp_path / "vit.onnx", x), source(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match="exists already"):
        convert_file(tmp_path / "input.pth", tmp_path / "vit.onnx", "onnx")


@needs_onnx
@torch.no_grad()
@pytest.mark.parametrize("kwargs", [{}, {"class_token": True, "final_norm": True}], ids=["SelfPatch", "DINO"])
def test_a_fixed_size_resizes_the_position_embedding_as_the_network_does(tmp_path, kwargs):
    source = small(**kwargs)
    assert write_onnx(source, tmp_path / "vit.onnx", (48, 80), {"arch": "small"}) < 1e-4
    x = torch.randn(2, 3, 48, 80)
    torch.testing.assert_close(features(tmp_path / "vit.onnx", x), source(x), rtol=1e-4, atol=1e-4)
    import onnx
    assert {entry.key: entry.value for entry in onnx.load(tmp_path / "vit.onnx").metadata_props}["arch"] == "small"


@pytest.mark.parametrize("grid", [(4, 4), (4, 5), (3, 4), (1, 1), (30, 52)])
@pytest.mark.parametrize("class_token", [False, True])
@torch.no_grad()
def test_positions_in_the_graph_are_the_networks(grid, class_token):
    source = small(class_token=class_token)
    ours, theirs = onnx_file.resized_positions(source, grid), source.interpolate_pos_encoding(grid)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours, theirs) or grid != (4, 4)


@needs_onnx
@torch.no_grad()
def test_one_file_takes_any_size(tmp_path):
    source = small(class_token=True, final_norm=True)
    assert write_onnx(source, tmp_path / "vit.onnx") < 1e-4
    for size in ((1, 64, 64), (2, 16, 16), (1, 480, 832), (3, 64, 16)):
        x = torch.randn(size[0], 3, *size[1:])
        torch.testing.assert_close(features(tmp_path / "vit.onnx", x), source(x), rtol=1e-4, atol=1e-4)
    assert source.interpolate_pos_encoding((4, 4)).data_ptr() == source.pos_embed[
        :, source.num_prefix_tokens:].data_ptr()  # the network itself is what it was


@needs_onnx
def test_a_file_with_other_features_is_not_kept(tmp_path, monkeypatch):
    (tmp_path / "vit.onnx").write_text("before")
    monkeypatch.setattr(onnx_file, "TOLERANCE", -1.0)
    with pytest.raises(CheckpointError, match="differ by up to"):
        write_onnx(small(), tmp_path / "vit.onnx", (64, 64))
    assert os.listdir(tmp_path) == ["vit.onnx"] and (tmp_path / "vit.onnx").read_text() == "before"


@needs_onnx
def test_a_file_that_cannot_be_run_is_one_line(tmp_path):
    (tmp_path / "vit.onnx").write_text("no model")
    with pytest.raises(CheckpointError, match="^onnxruntime cannot run the ONNX file"):
        onnx_file.compare(small(), tmp_path / "vit.onnx", (64, 64))


def test_without_onnxruntime_the_job_says_that_it_did_not_compare(tmp_path, monkeypatch, capsys):
    torch.save(vit_tiny(patch_size=56).state_dict(), tmp_path / "input.pth")
    monkeypatch.setattr(convert_checkpoint, "write_onnx", lambda *_: None)
    monkeypatch.setattr(convert_checkpoint, "check_packages", lambda: None)
    convert_file(tmp_path / "input.pth", tmp_path / "vit.onnx", "onnx")
    assert "since onnxruntime is not installed: pip install onnxruntime\n" in capsys.readouterr().out


@pytest.mark.parametrize("size", [(224, 225), (0, 224), (-16, 224), (8, 224), (224, 2**20)])
def test_image_sizes_that_do_not_fit(size):
    with pytest.raises(ConfigError, match=f"--image_size {size[0]} {size[1]}: give height and width as multiples"):
        check_image_size(size, 16)
    check_image_size((480, 832), 16)
