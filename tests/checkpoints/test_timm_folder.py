"""The folder for timm: the same features through local-dir: and hf-hub:, the model card, and what it never replaces."""
import argparse
import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from golden_rules import set_weights
from repository import ROOT
from timm.models import _factory, _hub

from convert_checkpoint import convert_file, get_args_parser, main
from selfpatch.checkpoints import timm_folder
from selfpatch.checkpoints.files import CheckpointError
from selfpatch.checkpoints.info import CheckpointInfo
from selfpatch.checkpoints.loading import load_backbone
from selfpatch.checkpoints.timm_folder import CARD, CONFIG, WEIGHTS, card_options, model_card
from selfpatch.method.vision_transformer import vit_pico, vit_small, vit_tiny
from selfpatch.whole_files import WriteError

needs_local_dir = pytest.mark.skipif("local-dir" not in Path(_factory.__file__).read_text(),
                                     reason="timm reads local-dir: from 1.0.16 on")
OPTIONS = {"arch": "vit_tiny", "k_num": 4, "lr": 0.0005, "global_crops_scale": [0.25, 1.0], "epochs": 100,
           "data_path": "/home/someone/imagenet", "output_dir": ".", "dist_url": "env://", "num_workers": 10,
           "data": "12 images in 2 folders, checksum 1234abcd"}


def save_run(path, model=None):
    """A training run's checkpoint of a network; a vit_tiny if None."""
    model = set_weights(model or vit_tiny(), 0).eval()
    torch.save({"teacher": {f"backbone.{k}": v for k, v in model.state_dict().items()}
                | {"ca_head.cls_token": torch.zeros(1, 1, 192)}, "epoch": 100, "args": argparse.Namespace(**OPTIONS)},
               path)
    return model


@pytest.fixture
def run_file(tmp_path):
    save_run(tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth"


@torch.no_grad()
def assert_same_features(name, source):
    model = timm.create_model(name, pretrained=True).eval()
    side = round((source.pos_embed.shape[1] - source.num_prefix_tokens) ** 0.5) * source.patch_size
    config = timm.data.resolve_model_data_config(model)
    assert tuple(config["input_size"]) == (3, side, side) and config["crop_pct"] == 0.875
    assert config["interpolation"] == "bicubic" and tuple(config["std"]) == (0.229, 0.224, 0.225)
    x = torch.randn(1, 3, side, side)
    tokens = model(x)
    torch.testing.assert_close(tokens[:, source.num_prefix_tokens:], source(x), rtol=1e-5, atol=1e-5)
    assert tokens.shape[1] == source(x).shape[1] + source.num_prefix_tokens


@needs_local_dir
@pytest.mark.parametrize("make", [vit_tiny, lambda: vit_tiny(patch_size=8, img_size=96),
                                  lambda: vit_tiny(class_token=True, final_norm=True), vit_pico],
                         ids=["SelfPatch", "patch 8, 96 pixels", "DINO", "vit_pico"])
def test_local_dir_gives_the_same_features(tmp_path, capsys, make):
    source = save_run(tmp_path / "run.pth", make())
    main(get_args_parser().parse_args([str(tmp_path / "run.pth"), str(tmp_path / "vit-s.v0.1"), "--to", "timm"]))
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line == f"load it with: timm.create_model('local-dir:{tmp_path}/vit-s.v0.1', pretrained=True)"
    assert sorted(os.listdir(tmp_path / "vit-s.v0.1")) == sorted([CARD, CONFIG, WEIGHTS])
    assert_same_features(f"local-dir:{tmp_path}/vit-s.v0.1", source)
    assert torch.equal(load_backbone(tmp_path / "vit-s.v0.1").pos_embed, source.pos_embed)


@needs_local_dir
def test_the_printed_line_loads_the_weights(tmp_path, run_file, monkeypatch):
    convert_file(run_file, tmp_path / "vit", "timm")
    page = (ROOT / "docs" / "LIBRARY.md").read_text()
    monkeypatch.chdir(tmp_path)
    model = eval(re.search(r"timm\.create_model\('local-dir:vit'[^)]*\)", page)[0])
    assert torch.equal(model.blocks[0].norm1.weight, torch.load(run_file, weights_only=False)["teacher"][
        "backbone.blocks.0.norm1.weight"])


@needs_local_dir
def test_a_known_number_of_heads_is_in_the_config(tmp_path):
    torch.save(vit_small(num_heads=12).state_dict(), tmp_path / "moco.pth")
    convert_file(tmp_path / "moco.pth", tmp_path / "vit", "timm", num_heads=12)
    assert json.loads((tmp_path / "vit" / CONFIG).read_text())["model_args"]["num_heads"] == 12
    assert timm.create_model(f"local-dir:{tmp_path}/vit", pretrained=True).blocks[0].attn.num_heads == 12


@needs_local_dir
def test_a_classifier_on_the_mean_of_the_patches_can_be_added(tmp_path, run_file):
    convert_file(run_file, tmp_path / "vit", "timm")
    model = timm.create_model(f"local-dir:{tmp_path}/vit", pretrained=True, num_classes=10, global_pool="avg")
    assert model(torch.randn(2, 3, 224, 224)).shape == (2, 10)
    assert torch.equal(model.pos_embed, set_weights(vit_tiny(), 0).pos_embed)


@pytest.mark.skipif(not _hub.has_hf_hub(), reason=f"timm {timm.__version__} cannot use this huggingface_hub")
def test_hf_hub_gives_the_same_features(tmp_path, monkeypatch, run_file):
    """The files are those of an upload; only the download is replaced."""
    convert_file(run_file, tmp_path / "vit", "timm")

    def download(repo_id, filename, *args, **kwargs):
        assert repo_id == "someone/vit"
        if not (tmp_path / "vit" / filename).exists():
            from huggingface_hub.errors import EntryNotFoundError
            raise EntryNotFoundError(filename)
        return str(tmp_path / "vit" / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    assert_same_features("hf-hub:someone/vit", set_weights(vit_tiny(), 0).eval())


def test_model_card(tmp_path, run_file):
    convert_file(run_file, tmp_path / "vit", "timm")
    card = (tmp_path / "vit" / CARD).read_text()
    assert card.startswith("---\nlibrary_name: timm\npipeline_tag: image-feature-extraction\n")
    assert "# vit\n\nA Vision Transformer pretrained without labels by SelfPatch: vit_tiny" in card
    assert ", patch size 16, 5.5 million parameters, images of 224×224 pixels, without a class token" in card
    assert "Converted from `checkpoint.pth` (SelfPatch run, network teacher, epoch 100)." in card
    assert "[1, 196, 192], row by row\n" in card and "yun2022selfpatch" in card
    options = {line.strip() for line in card.splitlines() if line.startswith("    ")}
    assert {"arch: vit_tiny", "k_num: 4", "global_crops_scale: 0.25 1.0", "epochs: 100",
            "data: 12 images in 2 folders, checksum 1234abcd"} <= options
    assert not any(word in card for word in ("someone", "output_dir", "env://", "num_workers"))


def test_model_card_of_a_backbone_without_options(tmp_path):
    torch.save(vit_tiny(class_token=True, final_norm=True).state_dict(), tmp_path / "dino.pth")
    convert_file(tmp_path / "dino.pth", tmp_path / "vit", "timm")
    card = (tmp_path / "vit" / CARD).read_text()
    assert "does not record them" in card and "[1, 197, 192], row by row, the class token first" in card
    assert "yun2022selfpatch" not in card and "without labels" not in card  # timm's files may be supervised


def test_a_file_cannot_write_markdown_through_its_options_or_name():
    args = {"arch": "vit_tiny\n# Heading", "x": object(), "y": [object()], 3: 4, "z\nname": 1, "path": "C:\\me"}
    assert card_options(args) == {"arch": "vit_tiny?# Heading", "z?name": "1"}
    info = CheckpointInfo(Path("a`b\n.pth"), "backbone", None, "vit_tiny", 16, 14, False, False, 1, None, args, {})
    card = model_card({}, info, "new\nname")
    assert "`a'b?.pth`" in card and "# new?name\n" in card and "\n    arch: vit_tiny?# Heading\n" in card


def test_nothing_is_replaced_silently(tmp_path, run_file):
    (tmp_path / "empty").mkdir()
    convert_file(run_file, tmp_path / "empty", "timm")
    (tmp_path / "empty" / CARD).write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        convert_file(run_file, tmp_path / "empty", "timm")
    assert (tmp_path / "empty" / CARD).read_text() == "mine"
    convert_file(run_file, tmp_path / "empty", "timm", overwrite=True)
    assert (tmp_path / "empty" / CARD).read_text() != "mine"
    (tmp_path / "empty" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds other files, such as thesis.txt"):
        convert_file(run_file, tmp_path / "empty", "timm", overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        convert_file(run_file, tmp_path / "file", "timm", overwrite=True)
    assert (tmp_path / "empty" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"


def test_the_input_is_not_replaced(tmp_path, run_file):
    convert_file(run_file, tmp_path / "vit", "timm")
    (tmp_path / "link").symlink_to(tmp_path / "vit")
    for output in ("vit", "link"):
        with pytest.raises(CheckpointError, match="holds the input"):
            convert_file(tmp_path / "vit" / WEIGHTS, tmp_path / output, "timm", overwrite=True)


@pytest.mark.parametrize("step", ["write_checkpoint", "model_card", "rename"])
def test_a_failure_leaves_the_folder_as_it_was(tmp_path, monkeypatch, run_file, step):
    convert_file(run_file, tmp_path / "vit", "timm")
    before = {path.name: path.read_bytes() for path in (tmp_path / "vit").iterdir()}
    save_run(run_file, vit_tiny(patch_size=8))

    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    rename = Path.rename
    if step == "rename":
        monkeypatch.setattr(Path, "rename", lambda path, to: no_space() if path.suffix == ".tmp" else rename(path, to))
    else:
        monkeypatch.setattr(timm_folder, step, no_space)
    for folder in ("vit", "new"):
        with pytest.raises(WriteError, match=f"{folder} cannot be written: No space left on device"):
            convert_file(run_file, tmp_path / folder, "timm", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pth", "vit"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "vit").iterdir()} == before


def test_a_link_stays_a_link(tmp_path, run_file):
    convert_file(run_file, tmp_path / "vit", "timm")
    shutil.move(tmp_path / "vit", tmp_path / "disk")
    (tmp_path / "vit").symlink_to(tmp_path / "disk")
    convert_file(run_file, tmp_path / "vit", "timm", overwrite=True)
    assert (tmp_path / "vit").is_symlink() and (tmp_path / "disk" / WEIGHTS).is_file()
