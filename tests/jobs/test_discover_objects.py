"""The job of object discovery: boxes, CorLoc, pictures, two processes."""
import json

import pytest
import torch
from dense_data import UNTRAINED, make_folders, make_voc
from evaluation_jobs import run_job, run_two
from PIL import Image

import discover_objects as job
from selfpatch.data.normalisation import IMAGENET_MEAN, IMAGENET_STD


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return make_voc(tmp_path_factory.mktemp("voc"))


def test_images_are_padded_with_zeros_after_normalisation():
    image = job.prepare(torch.full((3, 30, 50), 255, dtype=torch.uint8), 16, (IMAGENET_MEAN, IMAGENET_STD))
    assert image.shape == (1, 3, 32, 64)
    assert (image[:, :, :30, :50] > 2).all() and not image[:, :, 30:].any() and not image[:, :, :, 50:].any()


def test_job_scores_and_draws(voc, tmp_path, small_network, capsys):
    output, pictures = tmp_path / "out.json", tmp_path / "pictures"
    words = ("--data", f"voc:{voc}", *UNTRAINED, "--output", output, "--pictures", pictures)
    assert run_job(job, *words) == 0
    printed = capsys.readouterr().out
    assert "LOST, CorLoc" in printed and "TokenCut, CorLoc" in printed
    content = json.loads(output.read_text())
    (network,), ((name, boxes),) = content["networks"], content["boxes"].items()
    assert network["figures"]["images"] == network["figures"]["of them scored"] == 3
    assert sorted(boxes) == ["000000", "000001", "000002"]
    for box in boxes["000000"].values():
        assert 0 <= box[0] < box[2] <= 96 and 0 <= box[1] < box[3] <= 64
    drawn = sorted(path.name for path in (pictures / name).iterdir())
    assert drawn == [f"{i:06}.png" for i in range(3)]
    assert Image.open(pictures / name / drawn[0]).width == 96
    assert run_job(job, *words, "--overwrite", "--num_workers", 2) == 0
    again = json.loads(output.read_text())  # of images that worker processes read
    assert again["boxes"] == content["boxes"] and again["networks"] == content["networks"]
    assert run_job(job, *words[:-4], "--pictures", pictures) == 2
    assert "is not empty: give another name, or --overwrite" in capsys.readouterr().err


def test_network_of_timm_with_registers(voc, capsys):
    """Patches of 14: 64×96 pixels are padded to 5 × 7 of them."""
    assert run_job(job, "--data", f"voc:{voc}", *UNTRAINED, "--arch", "timm:vit_small_patch14_reg4_dinov2") == 0
    assert "TokenCut, CorLoc" in capsys.readouterr().out


def test_images_without_boxes(tmp_path, small_network, capsys):
    folder = make_folders(tmp_path, 1).split(",")[0]
    for feature in ("keys", "patches"):
        assert run_job(job, "--data", f"images:{folder}", *UNTRAINED, "--feature", feature, "--method", "lost") == 0
        printed = capsys.readouterr().out
        assert "CorLoc" not in printed and "of them scored" in printed


def test_pictures_are_not_written_into_what_is_read(tmp_path, capsys):
    folders = make_folders(tmp_path, 1)
    for data, pictures in ((f"images:{tmp_path / 'images'}", tmp_path / "images/found"),
                           (f"folders:{folders}", tmp_path / "masks")):
        assert run_job(job, "--data", data, *UNTRAINED, "--pictures", pictures) == 2
        err = capsys.readouterr().err
        assert "all of which is read: the next run would take the pictures for images" in err and err.count("\n") == 1


@pytest.mark.parametrize("more, says", [(["--tau", 2], "--tau: it is 2.0, and must be above -1 and below 1"),
                                        (["--layer", -13], "--layer -13"),
                                        (["--pictures", __file__], "is not a folder: give another name"),
                                        (["--pictures", f"{__file__}/below"], "test_discover_objects.py cannot be")])
def test_refusals(voc, capsys, more, says):
    assert run_job(job, "--data", f"voc:{voc}", *UNTRAINED, *more) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


@pytest.mark.slow
def test_two_processes_find_the_same_boxes(voc, tmp_path):
    names = ["one.json", "two.json"]
    words = ["--data", f"voc:{voc}", *UNTRAINED]
    assert run_job(job, *words, "--output", tmp_path / names[0]) == 0
    found = run_two(job, *words, "--output", tmp_path / names[1])
    assert [status for status, *_ in found] == [0, 0], found
    one, two = (json.loads((tmp_path / name).read_text()) for name in names)
    assert one["boxes"] == two["boxes"] and one["networks"] == two["networks"]
