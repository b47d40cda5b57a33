"""The number of attention heads, which tensors do not tell: where it comes from, and that conversions keep it."""
import pytest
import timm
import torch
from golden_rules import set_weights
from layout_files import empty_like, saved, under

import convert_checkpoint
from convert_checkpoint import convert_file, get_args_parser, main
from selfpatch.checkpoints.files import CheckpointError
from selfpatch.checkpoints.loading import load_backbone, read_backbone
from selfpatch.method.vision_transformer import vit_small

IMAGE = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source():
    """MoCo v3's ViT-S: 12 heads of 32 channels."""
    return set_weights(vit_small(img_size=48, class_token=True, final_norm=True, num_heads=12), 0).eval()


@pytest.fixture(scope="module")
def state(source):
    return empty_like(source.state_dict())


@torch.no_grad()
def assert_same(model, source):
    torch.testing.assert_close(model(IMAGE), source(IMAGE), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make, key", [
    (lambda s: {"state_dict": under("module.momentum_encoder.", s)}, "teacher"),
    (lambda s: {"state_dict": under("module.base_encoder.", s) | under("module.momentum_encoder.", s)}, "base_encoder"),
    (lambda s: {"momentum_encoder": s, "base_encoder": s}, "teacher"),
    (lambda s: {"momentum_encoder": s, "base_encoder": s}, "momentum_encoder"),
    (lambda s: {"momentum_encoder": s, "base_encoder": s}, "base_encoder")])
def test_moco_v3(tmp_path, state, make, key, capsys):
    path = saved(tmp_path, make(state))
    assert load_backbone(path, key).num_heads == 12
    assert "MoCo v3 run" in (line := capsys.readouterr().out) and "patch size 16, 12 attention heads (as publ" in line
    assert load_backbone(path, key, num_heads=6).num_heads == 6
    assert "6 attention heads (as asked for)" in capsys.readouterr().out


def test_where_the_number_cannot_be_known(tmp_path, state):
    """MoCo v3's linear-vit-s has no name that tells it apart; SelfPatch's own networks always have 6."""
    assert "6 attention heads (assumed)" in str(read_backbone(saved(tmp_path, under("module.", state)))[1])
    run = {name: tensor for name, tensor in state.items() if not name.startswith(("cls_token", "norm."))}
    run["pos_embed"] = state["pos_embed"][:, 1:]
    assert "attention heads" not in str(read_backbone(saved(tmp_path, run))[1])


TARGETS = [("backbone", "out.pth"), ("backbone", "out.safetensors"), ("timm", "out.pth"), ("timm", "out.safetensors"),
           ("mmdet", "out.pth"), ("mmseg", "out.pth")]


@pytest.mark.parametrize("known, to, name", [
    *((i % 2 == 0, *target) for i, target in enumerate(TARGETS)),
    *(pytest.param(i % 2 == 1, *target, marks=pytest.mark.long) for i, target in enumerate(TARGETS))])
def test_conversions_record_the_number(tmp_path, source, to, name, known, capsys):
    prefix = "module.momentum_encoder." if known else "module."
    path, output = saved(tmp_path, {"state_dict": under(prefix, source.state_dict())}), tmp_path / name
    options = [] if known else ["--num_heads", "12"]
    main(get_args_parser().parse_args([str(path), str(output), "--to", to, *options]))
    out = capsys.readouterr().out
    assert f"12 attention heads ({'as published' if known else '--num_heads'})" in out
    assert "12 attention heads (recorded)" in out
    assert_same(load_backbone(output), source)
    line = out.strip().splitlines()[-1].removeprefix("load it with: ")
    if to == "timm":
        with torch.no_grad():
            torch.testing.assert_close(eval(line, {"timm": timm}).eval()(IMAGE)[:, 1:], source(IMAGE), rtol=1e-5,
                                       atol=1e-5)
    elif to != "backbone":
        assert line.startswith("backbone=dict(num_heads=12, init_cfg")
    again = tmp_path / "again.safetensors"
    convert_file(output, again, "backbone")  # and on from there
    assert_same(load_backbone(again), source)


def test_a_detector_keeps_its_number(tmp_path, state, capsys):
    path = saved(tmp_path, {"state_dict": under("backbone.", state) | {"rpn_head.a": torch.zeros(1)}})
    convert_file(path, tmp_path / "out.pth", "mmdet", keep_heads=True, num_heads=8)
    assert read_backbone(tmp_path / "out.pth")[1].num_heads == 8
    assert "load it with: model = dict(backbone=dict(num_heads=8)); load_from = '" in capsys.readouterr().out
    load_backbone(tmp_path / "out.pth")
    assert "note" not in capsys.readouterr().out


@pytest.mark.parametrize("number", [0, 5, -6, "six", 2.5, [6], "9" * 50])
def test_a_recorded_number_that_cannot_be(tmp_path, state, number):
    with pytest.raises(CheckpointError, match="file.pth: .* attention heads .recorded. do not divide the width 384"):
        read_backbone(saved(tmp_path, {"state_dict": state, "meta": {"num_heads": number}}))
    if isinstance(number, int):
        with pytest.raises(CheckpointError, match="--num_heads. do not divide"):
            convert_file(saved(tmp_path, state), tmp_path / "out.pth", "timm", num_heads=number)


def test_an_output_without_the_number_is_reported(tmp_path, state, monkeypatch):
    path = saved(tmp_path, under("momentum_encoder.", state))
    monkeypatch.setattr(convert_checkpoint, "write_checkpoint",
                        lambda content, path, metadata: torch.save(content["state_dict"], path))
    with pytest.raises(CheckpointError, match="differs from what was written"):
        convert_file(path, tmp_path / "out.pth", "backbone")
