"""Resuming with other options: said, or refused where it would be another run."""
import shutil

import pytest
from image_kinds import write_tar
from small_job import load, options

from main_selfpatch import train_dino
from selfpatch.data.dataset import build_dataset
from selfpatch.errors import ConfigError
from selfpatch.pretraining.resuming import compare_with_checkpoint, differences, plain_args

pytestmark = [pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning"),
              pytest.mark.usefixtures("small_network")]


@pytest.fixture
def words(two_epochs, image_folder, tmp_path):
    """The options of a run of which one epoch is done."""
    shutil.copy(two_epochs / "checkpoint0000.pth", tmp_path / "checkpoint.pth")
    return ["--epochs", 2, "--data_path", image_folder, "--output_dir", tmp_path]


@pytest.mark.parametrize("change, says", [
    (["--k_num", 2], "--k_num 2 (there 4)"), (["--seed", 1], "--seed 1 (there 0)"),
    (["--local_crops_number", 2], "--local_crops_number 2 (there 1)"),
    (["--global_crops_size", 64], "--global_crops_size 64 (there 48)"),
    (["--patch_loss_weight", 0.2], "--patch_loss_weight 0.2 (there 0.1)"),
    (["--batch_size_per_gpu", 3], "images in a step: 3 (there 4)")])
def test_another_run_is_refused_unless_allowed(words, tmp_path, change, says):
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with pytest.raises(ConfigError) as error:
        train_dino(options(*words, *change))
    assert says in str(error.value) and (tmp_path / "checkpoint.pth").read_bytes() == before
    name = str(error.value).split("--allow_changed ")[1]
    train_dino(options(*words, *change, "--allow_changed", name))
    assert load(tmp_path / "checkpoint.pth")["epoch"] == 2


def test_another_network_is_refused_before_its_weights_are_compared(two_epochs, image_folder, tmp_path):
    shutil.copy(two_epochs / "checkpoint0000.pth", tmp_path / "checkpoint.pth")
    given = ["--arch", "vit_small", "--head_hidden_dim", 64, "--seed", 1, "--allow_changed", "seed"]
    with pytest.raises(ConfigError) as error:
        train_dino(options("--epochs", 2, "--data_path", image_folder, "--output_dir", tmp_path, *given))
    assert str(error.value) == (
        f"{tmp_path}/checkpoint.pth is of another run: --arch vit_small (there vit_tiny), --head_hidden_dim 64 (there "
        "2048); give its values, choose another --output_dir")


def test_other_images_are_another_run(words, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "moved")
    words[words.index("--data_path") + 1] = tmp_path / "moved"
    (tmp_path / "moved" / "class0" / "00.jpg").rename(tmp_path / "moved" / "class0" / "99.jpg")
    with pytest.raises(ConfigError, match="data: 12 images, checksum .* .there 12 images.*changed data"):
        train_dino(options(*words))
    (tmp_path / "moved" / "class0" / "99.jpg").rename(tmp_path / "moved" / "class0" / "00.jpg")
    train_dino(options(*words))  # the same images in another place


def test_other_rates_are_said(words, capsys):
    train_dino(options(*words, "--lr", 0.001, "--teacher_temp", 0.05, "--momentum_teacher", 0.99, "--weight_decay", 0.1,
                       "--precision", "bf16"))
    out = capsys.readouterr().out
    for line in ("--lr 0.001 (was 0.0005)", "--teacher_temp 0.05 (was 0.04)", "--momentum_teacher 0.99 (was 0.996)",
                 "--weight_decay 0.1 (was 0.04)", "--precision bf16 (was auto)"):
        assert f"changed since the checkpoint: {line}" in out
    assert "output_dir" not in out.split("resuming")[0] and "workers" not in out.split("resuming")[0]


def test_accumulation_that_keeps_the_batch_is_no_change(words, capsys):
    train_dino(options(*words, "--batch_size_per_gpu", 2, "--accum_steps", 2))
    assert "changed since" not in capsys.readouterr().out


def test_fewer_epochs_than_are_done(two_epochs, image_folder, tmp_path):
    shutil.copy(two_epochs / "checkpoint.pth", tmp_path)
    with pytest.raises(ConfigError, match="--epochs 1, but .*checkpoint.pth is in epoch 2 already: give more --epochs"):
        train_dino(options("--epochs", 1, "--data_path", image_folder, "--output_dir", tmp_path))


def test_what_identifies_the_images_is_what_it_was():
    """Earlier versions wrote the number of folders too, which a list of the same images does not have."""
    earlier, now = ({"data": f"12 images{folders}, checksum 1a5e5fd3"} for folders in (" in 2 folders", ""))
    assert not differences(now, earlier) and differences(now, {"data": "12 images in 2 folders, checksum 00000000"})


def test_other_archives_of_the_same_names_are_another_run(image_folder, tmp_path):
    """As far as the sizes of their images tell; a folder does not say them, and may continue an archive's run."""
    def settings(data):
        return plain_args({}, 1, build_dataset(data))

    ours, folder = settings(write_tar(image_folder, tmp_path / "x.tar")), settings(image_folder)
    shutil.copytree(image_folder, tmp_path / "other")
    shutil.copy(image_folder / "class0" / "02.jpg", tmp_path / "other" / "class0" / "00.jpg")
    theirs = settings(write_tar(tmp_path / "other", tmp_path / "x.tar"))
    assert not differences(ours, folder) and ours["data"] == theirs["data"] == folder["data"]
    with pytest.raises(ConfigError, match="sizes of the images' files: checksum .*--allow_changed data_sizes"):
        compare_with_checkpoint(ours, theirs, [], tmp_path / "checkpoint.pth")
