"""Converted checkpoints give the same features in the other library; invalid requests are refused."""
import errno
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from golden_rules import set_weights
from repository import ROOT

import convert_checkpoint
import selfpatch
from convert_checkpoint import convert, convert_file, get_args_parser, loading_code, main
from selfpatch.checkpoints.files import CheckpointError, read_checkpoint
from selfpatch.checkpoints.loading import build_head, load_backbone, read_backbone
from selfpatch.method.selfpatch_head import SelfPatchHead
from selfpatch.method.vision_transformer import vit_pico, vit_small, vit_tiny
from selfpatch.whole_files import WriteError


@pytest.fixture(scope="module")
def source():
    return set_weights(vit_tiny(), 0).eval()


@pytest.fixture
def run_file(tmp_path, source):
    path = tmp_path / "checkpoint.pth"
    torch.save({"teacher": {f"backbone.{k}": v for k, v in source.state_dict().items()}
                | {"ca_head.cls_token": torch.zeros(1, 1, 192)}, "epoch": 100}, path)
    return path


def run(*argv):
    main(get_args_parser().parse_args([str(arg) for arg in argv]))


def evaluate(line, **names):
    """Evaluate the line of code that the job prints."""
    return eval(line, names).eval()


@torch.no_grad()
def assert_same(model, source, x):
    torch.testing.assert_close(model(x), source(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bare.pth", "bare.safetensors"])
def test_backbone(tmp_path, source, run_file, name, capsys):
    run(run_file, tmp_path / name, "--to", "backbone")
    written = read_checkpoint(tmp_path / name)
    assert written.keys() == source.state_dict().keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in source.state_dict().items())
    out = capsys.readouterr().out
    assert f"loaded {run_file}: SelfPatch run, key teacher" in out and f"wrote {tmp_path / name}: SelfPatch back" in out


@pytest.mark.parametrize("make", [
    lambda: (vit_tiny(), ".pth"), lambda: (vit_tiny(patch_size=8, img_size=96), ".safetensors"),
    lambda: (vit_tiny(class_token=True, final_norm=True), ".pth"), lambda: (vit_pico(), ".pth"),
    lambda: (vit_pico(num_heads=4), ".safetensors")],
    ids=["SelfPatch", "patch 8, 96 pixels", "DINO", "vit_pico", "vit_pico of 4 heads"])
@torch.no_grad()
def test_timm_gives_the_same_features(tmp_path, capsys, make):
    source, suffix = make()
    set_weights(source, 0).eval()
    torch.save(source.state_dict(), tmp_path / "input.pth")
    run(tmp_path / "input.pth", tmp_path / f"timm{suffix}", "--to", "timm", "--num_heads", source.num_heads)
    line = capsys.readouterr().out.strip().splitlines()[-1].removeprefix("load it with: ")
    model = evaluate(line, timm=timm)
    side = int(source.pos_embed.shape[1] ** 0.5) * source.patch_size
    x = torch.randn(1, 3, side, side)
    tokens = model(x)
    assert torch.equal(tokens, model.forward_features(x))
    patches = tokens if source.cls_token is None else tokens[:, 1:]
    torch.testing.assert_close(patches, source(x), rtol=1e-5, atol=1e-5)


def test_timm_line_is_the_one_on_the_librarys_page(tmp_path):
    with torch.device("meta"):
        shapes = vit_small().state_dict()
    # expanded scalars, of which torch.save writes one number each
    torch.save({name: torch.zeros(()).expand(tensor.shape) for name, tensor in shapes.items()}, tmp_path / "small.pth")
    info = read_backbone(tmp_path / "small.pth")[1]
    line = loading_code(info, "timm", False, "timm.pth")
    assert line.startswith("timm.create_model('vit_small_patch16_224', ")
    assert f"    {line}\n" in (ROOT / "docs" / "LIBRARY.md").read_text()


def test_mmseg_and_back(tmp_path, source, run_file):
    run(run_file, tmp_path / "mmseg.pth", "--to", "mmseg")
    written = read_checkpoint(tmp_path / "mmseg.pth")
    assert written["meta"]["epoch"] == 100
    state = written["state_dict"]
    assert {"pos_embed", "patch_embed.projection.weight", "layers.0.ln1.weight", "layers.11.ln2.bias",
            "layers.3.attn.attn.in_proj_weight", "layers.3.attn.attn.in_proj_bias",
            "layers.3.attn.attn.out_proj.weight", "layers.3.ffn.layers.0.0.weight",
            "layers.3.ffn.layers.1.bias"} < state.keys()
    assert not any(word in name for name in state for word in ("blocks", "norm", "qkv", "mlp"))
    assert torch.equal(state["layers.3.attn.attn.in_proj_bias"], source.blocks[3].attn.qkv.bias)
    run(tmp_path / "mmseg.pth", tmp_path / "back.pth", "--to", "backbone")
    back = read_checkpoint(tmp_path / "back.pth")
    assert back.keys() == source.state_dict().keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in source.state_dict().items())


def test_mmdet(tmp_path, source, run_file):
    run(run_file, tmp_path / "mmdet.pth", "--to", "mmdet")
    assert read_checkpoint(tmp_path / "mmdet.pth")["state_dict"].keys() == source.state_dict().keys()
    assert_same(load_backbone(tmp_path / "mmdet.pth"), source, torch.randn(1, 3, 48, 48))


def test_segmenter_keeps_its_heads(tmp_path, source, run_file):
    run(run_file, tmp_path / "mmseg.pth", "--to", "mmseg")
    heads = {"neck.fpn.weight": torch.randn(3), "decode_head.conv_seg.weight": torch.randn(3).half()}
    released = {f"backbone.{k}": v for k, v in read_checkpoint(tmp_path / "mmseg.pth")["state_dict"].items()} | heads
    torch.save({"meta": {}, "state_dict": released}, tmp_path / "released.pth")
    run(tmp_path / "released.pth", tmp_path / "ours.pth", "--to", "mmdet", "--keep_heads")
    ours = read_checkpoint(tmp_path / "ours.pth")["state_dict"]
    assert ours.keys() == {f"backbone.{k}" for k in source.state_dict()} | heads.keys()
    assert all(torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype for name, tensor in heads.items())
    run(tmp_path / "ours.pth", tmp_path / "again.pth", "--to", "mmseg", "--keep_heads")
    again = read_checkpoint(tmp_path / "again.pth")["state_dict"]
    assert again.keys() == released.keys() and all(torch.equal(again[name], released[name]) for name in released)


def test_convert_does_not_modify_its_input(run_file):
    state, info = read_backbone(run_file)
    names = list(state)
    convert(state, info, "mmseg")
    assert list(state) == names


def error_of(capsys, *argv):
    """Run the job as a script that fails; return its only line on stderr."""
    sys.argv[:] = ["convert_checkpoint.py", *map(str, argv)]
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("convert_checkpoint", run_name="__main__")
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("convert_checkpoint.py: error: ")
    return lines[0]


def test_refused_requests(tmp_path, run_file, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    output = tmp_path / "out.pth"
    (tmp_path / "page.pth").write_text("<!DOCTYPE html>")
    assert "page.pth is an HTML page" in error_of(capsys, tmp_path / "page.pth", output, "--to", "backbone")
    assert "none.pth cannot be read" in error_of(capsys, tmp_path / "none.pth", output, "--to", "backbone")
    assert "no network 'student'" in error_of(capsys, run_file, output, "--to", "timm", "--checkpoint_key", "student")
    assert "out.safetensors: --to mmseg" in error_of(capsys, run_file, tmp_path / "out.safetensors", "--to", "mmseg")
    assert "is not a directory" in error_of(capsys, run_file, tmp_path / "no" / "out.pth", "--to", "mmseg")
    assert "is the input" in error_of(capsys, run_file, run_file, "--to", "backbone", "--overwrite")
    run_folder = run_file.parent / "run"
    run_folder.mkdir()
    shutil.copy(run_file, run_folder / "checkpoint.pth")
    assert "is the input" in error_of(capsys, run_folder, run_folder / "checkpoint.pth", "--to", "timm", "--overwrite")
    assert "--keep_heads" in error_of(capsys, run_file, output, "--to", "timm", "--keep_heads")
    assert "invalid choice: 'keras'" in error_of(capsys, run_file, output, "--to", "keras")
    assert "out.pth: --to onnx is written as .onnx" in error_of(capsys, run_file, output, "--to", "onnx")
    assert "requires --to onnx" in error_of(capsys, run_file, output, "--to", "timm", "--image_size", 224, 224)
    (tmp_path / "folder.pth").mkdir()
    assert "is a folder" in error_of(capsys, run_file, tmp_path / "folder.pth", "--to", "timm", "--overwrite")
    assert "not a detector" in error_of(capsys, run_file, output, "--to", "mmdet", "--keep_heads")
    assert not output.exists()
    output.write_text("mine")
    assert "exists already" in error_of(capsys, run_file, output, "--to", "backbone")
    assert output.read_text() == "mine"
    run(run_file, output, "--to", "backbone", "--overwrite")
    assert read_backbone(output)[1].arch == "vit_tiny"


def test_full_disk_is_one_error(tmp_path, run_file, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(WriteError, match="out.pth cannot be written: No space left on device$"):
        convert_file(run_file, tmp_path / "out.pth", "timm")


def test_folder_that_may_not_be_read(tmp_path, run_file, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "closed")

    monkeypatch.setattr(Path, "exists", refused)
    with pytest.raises(CheckpointError, match="Permission denied: 'closed'"):
        convert_file(run_file, tmp_path / "out.pth", "timm")


def test_a_link_stays_a_link(tmp_path, run_file):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.pth").symlink_to(tmp_path / "disk" / "real.pth")
    for _ in range(2):  # new, and replaced
        convert_file(run_file, tmp_path / "link.pth", "backbone", overwrite=True)
        assert (tmp_path / "link.pth").is_symlink() and read_backbone(tmp_path / "disk" / "real.pth")[1].arch
    assert os.listdir(tmp_path / "disk") == ["real.pth"]


def test_paths_with_an_apostrophe(tmp_path, source, run_file, capsys):
    (tmp_path / "it's").mkdir()
    convert_file(run_file, tmp_path / "it's" / "out.pth", "backbone")
    line = capsys.readouterr().out.strip().splitlines()[-1].removeprefix("load it with: ")
    assert_same(evaluate(line, selfpatch=selfpatch), source, torch.randn(1, 3, 48, 48))


def test_output_that_differs_is_reported(tmp_path, run_file, monkeypatch):
    def negate(state, path, metadata):
        torch.save({name: -tensor for name, tensor in state.items()}, path)

    monkeypatch.setattr(convert_checkpoint, "write_checkpoint", negate)
    with pytest.raises(CheckpointError, match="differs from what was written"):
        convert_file(run_file, tmp_path / "out.pth", "timm")


@pytest.mark.parametrize("name", ["release.safetensors", "release.pth"])
def test_a_release_has_backbone_and_head_in_half_the_size(tmp_path, source, name, capsys):
    head = set_weights(SelfPatchHead(192, 3), 0)
    state = {f"backbone.{k}": v for k, v in source.state_dict().items()}
    state |= {f"ca_head.{k}": v for k, v in head.state_dict().items()}
    torch.save({"teacher": state | {"c_head.mlp.0.bias": torch.zeros(9)}, "epoch": 3, "args": {"k_num": 2}},
               tmp_path / "run.pth")
    run(tmp_path / "run.pth", tmp_path / name, "--to", "selfpatch", "--half")
    assert (tmp_path / name).stat().st_size < 0.52 * (tmp_path / "run.pth").stat().st_size
    loaded, info = read_backbone(tmp_path / name)
    assert all(torch.equal(loaded[k], v.half().float()) for k, v in source.state_dict().items())
    assert all(torch.equal(v, head.state_dict()[k].half().float())
               for k, v in build_head(info).state_dict().items())
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("load it with: "))
    exec(line.removeprefix("load it with: "), names := {"selfpatch": selfpatch})
    assert names["head"].k_num == 2 and torch.equal(names["model"].pos_embed, loaded["pos_embed"])
    assert info.has_selfpatch_head and not any(k.startswith("c_head") for k in info.other_tensors)


def test_a_head_that_was_not_written_whole_is_found(tmp_path, monkeypatch, run_file):
    write = convert_checkpoint.write_checkpoint

    def spoil(content, *args, **kwargs):
        write(content | {"ca_head.cls_token": torch.ones(1, 1, 192)}, *args, **kwargs)
    monkeypatch.setattr(convert_checkpoint, "write_checkpoint", spoil)
    with pytest.raises(CheckpointError, match="differs from what was written"):
        convert_file(run_file, tmp_path / "out.safetensors", "selfpatch")


def test_what_cannot_be_released_is_refused(tmp_path, capsys, run_file):
    torch.save(vit_tiny().state_dict(), tmp_path / "bare.pth")
    output = tmp_path / "out.safetensors"
    assert "without a SelfPatch head" in error_of(capsys, tmp_path / "bare.pth", output, "--to", "selfpatch")
    assert "--half requires" in error_of(capsys, run_file, tmp_path / "out.pth", "--to", "mmseg", "--half")
    large = set_weights(vit_tiny(), 0)
    large.pos_embed.data[0, 0, 0] = 1e5
    torch.save(large.state_dict(), tmp_path / "large.pth")
    assert "pos_embed has values outside float16's range" in error_of(
        capsys, tmp_path / "large.pth", output, "--to", "backbone", "--half")
    assert not output.exists()
