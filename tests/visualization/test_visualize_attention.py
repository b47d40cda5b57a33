"""Attention maps and positives: the numbers are the network's own, and they are drawn where they belong."""
import argparse
import runpy
import sys

import numpy as np
import pytest
import torch
from golden_rules import set_weights
from networks import save_selfpatch_run
from PIL import Image

import visualize
from selfpatch.errors import ConfigError
from selfpatch.method.selfpatch_head import SelfPatchHead, positive_matching
from selfpatch.method.vision_transformer import vit_tiny
from selfpatch.visualization import features as pictures
from selfpatch.visualization.features import head_attention, self_attention
from selfpatch.visualization.inputs import to_tensor


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    return save_selfpatch_run(tmp_path_factory.mktemp("run") / "checkpoint.pth")


@pytest.fixture(scope="module")
def dino_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("dino") / "dino.pth"
    torch.save(set_weights(vit_tiny(class_token=True, final_norm=True), 0).eval().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """90 high, 140 wide; scaled to a short side of 64 it has 4 × 6 patches of 16."""
    pixels = np.random.RandomState(0).randint(0, 255, (9, 14, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("image") / "photo.jpg"
    Image.fromarray(pixels).resize((140, 90)).save(path)
    return path


def input_of(module, call):
    """What the module gets while call runs."""
    seen = []
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    call()
    hook.remove()
    return seen[-1]


@pytest.mark.parametrize("class_token", [False, True])
@torch.no_grad()
def test_self_attention_is_the_last_blocks(class_token):
    """The weights times the values are what the block itself computes."""
    backbone, x = set_weights(vit_tiny(class_token=class_token), 0).eval(), torch.randn(1, 3, 48, 64)
    attention = backbone.blocks[-1].attn
    values = attention.qkv(input_of(attention.qkv, lambda: backbone(x)))[0].chunk(3, -1)[2]
    expected = input_of(attention.proj, lambda: backbone(x))[0]
    for query in (0, 5):
        weights = self_attention(backbone, x, query)
        assert weights.shape == (3, 12)
        if class_token:  # what the class token keeps is not drawn
            weights = torch.cat([1 - weights.sum(1, keepdim=True), weights], dim=1)
        torch.testing.assert_close(weights.sum(1), torch.ones(3))
        ours = torch.cat([w @ v for w, v in zip(weights, values.split(64, dim=1), strict=True)])
        torch.testing.assert_close(ours, expected[query], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_head_attention_is_the_second_blocks():
    backbone, head = set_weights(vit_tiny(), 0).eval(), set_weights(SelfPatchHead(192, 3), 0).eval()
    head.fast, x = False, torch.randn(1, 3, 48, 64)  # the plain form calls the layers
    patches, attention = backbone(x), head.cls_blocks[1].attn
    values = attention.v(input_of(attention.v, lambda: head(patches)))[0]
    expected = input_of(attention.proj, lambda: head(patches))[0]
    weights = head_attention(backbone, head, x)
    assert weights.shape == (3, 12)
    weights = torch.cat([1 - weights.sum(1, keepdim=True), weights], dim=1)
    ours = torch.cat([w @ v for w, v in zip(weights, values.split(64, dim=1), strict=True)])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_attention_is_drawn_where_it_is():
    maps = np.zeros((3, 4, 6), dtype=np.float32)
    maps[0, 0, 0] = maps[1, 3, 5] = maps[2, 1, 2] = 1
    image = Image.new("RGB", (96, 64), "blue")
    drawn = np.asarray(pictures.attention_panels(image, maps, None, 16)).astype(int)
    width, height = pictures.PANEL_WIDTH, round(pictures.PANEL_WIDTH * 64 / 96)

    def panel(index):
        y, x = index // 3 * (height + pictures.LABEL_HEIGHT + pictures.GAP), index % 3 * (width + pictures.GAP)
        y, x = y + pictures.LABEL_HEIGHT, x + pictures.GAP
        return drawn[y:y + height, x:x + width]

    assert (panel(0) == (0, 0, 255)).all()  # the image; then the mean, then the heads
    for index, (row, column) in ((2, (0, 0)), (3, (3, 5)), (4, (1, 2))):
        bright = panel(index).sum(2) > 500
        ys, xs = np.nonzero(bright)
        cell = width / 6
        assert bright.mean() == pytest.approx(1 / 24, rel=0.05)
        assert (ys.mean() // cell, xs.mean() // cell) == (row, column)
    flat = pictures.heat(np.full((2, 2), 0.5), (4, 4))
    assert len(flat.getcolors()) == 1  # all alike: no division by zero


def test_positives_are_drawn_where_they_are():
    image = Image.new("RGB", (96, 64), "black")
    drawn = pictures.positives_over(image, 16, [(0, 0), (2, 3)], [[(0, 1), (3, 5)], [(1, 3), (2, 2)]])
    assert drawn.size == (240, 160)
    cell = 40
    colours = [tuple(int(c[i:i + 2], 16) for i in (1, 3, 5)) for c in pictures.COLOURS]
    framed = {(row, column): drawn.getpixel((column * cell + 3, row * cell + cell // 2))
              for row in range(4) for column in range(6)}
    assert framed.pop((0, 0)) == framed.pop((0, 1)) == framed.pop((3, 5)) == colours[0]
    assert framed.pop((2, 3)) == framed.pop((1, 3)) == framed.pop((2, 2)) == colours[1]
    assert set(framed.values()) == {(0, 0, 0)}

    def ink(row, column):
        middle = drawn.crop((column * cell + 8, row * cell + 6, column * cell + 32, row * cell + 34))
        return np.asarray(middle.convert("L")) > 128

    assert ink(0, 1).any() and ink(3, 5).any() and not ink(0, 0).any()
    assert (ink(0, 1) == ink(1, 3)).all() and (ink(0, 1) != ink(3, 5)).any()  # 1 is not 2


def run(*argv):
    args = visualize.get_args_parser().parse_args([str(arg) for arg in argv])
    args.func(args)


def test_an_orientation_tag_is_reported(tmp_path, photo, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photo).save(tmp_path / "turned.png", exif=exif)
    Image.open(photo).save(tmp_path / "upright.png")
    assert visualize.read_image(tmp_path / "turned.png").tobytes() == visualize.read_image(
        tmp_path / "upright.png").tobytes()
    assert capsys.readouterr().out == (f"{tmp_path}/turned.png: EXIF orientation 6 is ignored, as in training: pixels "
                                       "are used as stored\n")


def test_positives_job_draws_what_matching_picks(tmp_path, run_file, photo, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(pictures, "positives_over", lambda image, size, patches, chosen: asked.append(
        (image, size, patches, chosen)) or Image.new("RGB", (8, 8)))
    output = tmp_path / "positives.png"
    run("positives", "--pretrained_weights", run_file, "--image_path", photo, "--image_size", 64, "--output", output,
        "--patches", "0,0", "2,5")
    (image, patch_size, patches, chosen), = asked
    assert (image.size, patch_size, patches) == ((96, 64), 16, [(0, 0), (2, 5)])
    backbone = visualize.load(argparse.Namespace(pretrained_weights=run_file, checkpoint_key="teacher", arch=None,
                                                 patch_size=None, random_weights=False))[0]
    expected = positive_matching(backbone(to_tensor(image)), (4, 6), 2)[0]  # k_num 2 is the run's own
    assert chosen == [[divmod(i, 6) for i in expected[index].tolist()] for index in (0, 17)]
    out = capsys.readouterr().out
    assert f"patch 2,5: {chosen[1][0][0]},{chosen[1][0][1]} (" in out and "epoch 7" in out
    run("positives", "--pretrained_weights", run_file, "--image_path", photo, "--image_size", 64, "--output", output,
        "--overwrite", "--k_num", 5)
    assert len(asked[1][2]) == 9 and {len(picks) for picks in asked[1][3]} == {5}


def test_attention_job(tmp_path, run_file, dino_file, photo, capsys):
    options = ("--image_path", photo, "--image_size", 64)
    run("attention", "--pretrained_weights", run_file, *options, "--output", tmp_path / "ours.png")
    assert "class token of the SelfPatch head over 4×6 patches, 3 heads" in capsys.readouterr().out
    run("attention", "--pretrained_weights", dino_file, *options, "--output", tmp_path / "dino.png")
    assert "attention of the class token over 4×6" in capsys.readouterr().out
    run("attention", "--pretrained_weights", dino_file, *options, "--output", tmp_path / "patch.png", "--patch", "3,5")
    assert "attention of the patch" in capsys.readouterr().out
    run("attention", "--random_weights", "--arch", "vit_tiny", *options, "--output", tmp_path / "random.png")
    assert "random weights: vit_tiny" in capsys.readouterr().out
    pictures = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("ours", "dino", "patch", "random")]
    assert len({picture.shape for picture in pictures}) == 1
    assert all((a != b).any() for i, a in enumerate(pictures) for b in pictures[:i])


@pytest.mark.parametrize("precision, within", [("fp32", 0), ("bf16", 0.1)])
def test_device_and_precision(tmp_path, run_file, photo, monkeypatch, precision, within):
    """Attention and features are those of the precision; what is drawn of them is float32 on the CPU."""
    drawn = []
    monkeypatch.setattr(pictures, "attention_panels", lambda _, x, *__: drawn.append(x) or Image.new("L", (1, 1)))
    monkeypatch.setattr(pictures, "component_colours", lambda x, *_, **__: (drawn.append(x.numpy()) or [], x[:, 0] > 0))
    monkeypatch.setattr(pictures, "component_panels", lambda *_: Image.new("L", (1, 1)))
    for given in ("fp32", precision):
        for command in ("attention", "pca"):
            run(command, "--pretrained_weights", run_file, "--image_path", photo, "--image_size", 64, "--overwrite",
                "--output", tmp_path / "x.png", "--device", "cpu", "--precision", given)
    for exact, rounded in zip(drawn[:2], drawn[2:], strict=True):
        assert rounded.dtype == np.float32
        assert 0 < abs(exact - rounded).max() < within * abs(exact).max() or precision == "fp32" and (
            exact == rounded).all()


def test_the_long_one_of_several_images_is_named(tmp_path, run_file, photo):
    Image.new("RGB", (600, 20)).save(tmp_path / "panorama.png")
    with pytest.raises(ConfigError, match="panorama.png: it is 600×20: with one side more than 16 times the other"):
        run("pca", "--pretrained_weights", run_file, "--image_path", photo, tmp_path / "panorama.png", photo,
            "--output", tmp_path / "pca.png")


@pytest.mark.parametrize("change, expected", [
    ({"--pretrained_weights": ""}, "random network: give a checkpoint, or --random_weights"),
    ({"--arch": "vit_base"}, "error: arch vit_base contradicts"),
    ({"--patch_size": "8"}, "error: patch size 8 contradicts"),
    ({"--checkpoint_key": "student"}, "no network 'student': it has teacher"),
    ({"--image_path": "none.jpg"}, "cannot read the image none.jpg (No such file"),
    ({"--image_path": __file__}, "not an image"),
    ({"--device": "gpu"}, "--device gpu: there is no such device"),
    ({"--precision": "half"}, "argument --precision: invalid choice: 'half'"),
    ({"--image_size": "40"}, "--image_size 40 is under 3 patches of 16: give 48 or more"),
    ({"--patches": "4,0"}, "--patches 4,0 is outside the image, whose patches are 0,0 to 3,5"),
    ({"--output": "picture.jpg"}, "a name that ends in .png"),
    ({"--output": "nowhere/picture.png"}, "nowhere is not a folder"),
])
def test_refusals_are_one_line(tmp_path, run_file, photo, capsys, monkeypatch, change, expected):
    options = {"--pretrained_weights": run_file, "--image_path": photo, "--image_size": 64,
               "--output": tmp_path / "out.png"} | change
    monkeypatch.setattr(sys, "argv", ["visualize.py", "positives", *(str(x) for pair in options.items() for x in pair)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("visualize", run_name="__main__")
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and expected in lines[0]
    assert not list(tmp_path.iterdir())


def test_output_is_not_overwritten_silently(tmp_path, run_file, photo):
    output = tmp_path / "out.png"
    output.write_text("mine")
    with pytest.raises(ValueError, match="exists: give another name"):
        run("attention", "--pretrained_weights", run_file, "--image_path", photo, "--output", output)
    assert output.read_text() == "mine"


def test_bare_backbone_has_no_class_token_to_ask(tmp_path, photo):
    torch.save(vit_tiny().state_dict(), tmp_path / "bare.pth")
    options = ("--pretrained_weights", tmp_path / "bare.pth", "--image_path", photo, "--image_size", 64)
    with pytest.raises(ValueError, match="neither a class token nor a SelfPatch head.*--patch"):
        run("attention", *options, "--output", tmp_path / "out.png")
    run("attention", *options, "--output", tmp_path / "out.png", "--patch", "0,0")
    run("positives", *options, "--output", tmp_path / "positives.png")
    assert Image.open(tmp_path / "positives.png").size == (240, 160)
