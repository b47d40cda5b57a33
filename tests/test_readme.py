"""The README is short, and its Python examples and those of docs/LIBRARY.md run as printed."""
import pytest
import torch
from repository import ROOT, example
from small_job import load, options

import main_selfpatch
from selfpatch.method.losses import DINOLoss
from selfpatch.method.training_run import build_networks

WEIGHTS = ROOT / "weights" / "vit_pico8_selfpatch.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


def test_the_readme_is_short():
    readme = (ROOT / "README.md").read_bytes()
    assert len(readme) <= 10_000
    first_screen = readme.decode().split("\n## ")[0]
    assert "demo.py" in first_screen and "docs/demo.jpg" in first_screen


def test_features_from_a_checkpoint():
    namespace = {"images": torch.rand(2, 3, 64, 96)}
    exec(example("README.md", "Use a backbone").replace("checkpoint.pth", str(WEIGHTS)), namespace)
    assert namespace["features"].shape == (2, 96, 96)


@pytest.mark.parametrize("loss", ["FusedDINOLoss", pytest.param("DINOLoss", marks=pytest.mark.long)])
def test_two_steps_in_a_notebook(image_folder, capsys, loss):
    code = example("docs/LIBRARY.md", "Train in a notebook").replace("FusedDINOLoss(", f"{loss}(")
    assert "/path/to/images" in code
    namespace = {"DINOLoss": DINOLoss}
    exec(code.replace("/path/to/images", str(image_folder)), namespace)
    assert capsys.readouterr().out.count("Losses(total=") == 2
    assert namespace["run"].step == 2


def test_a_variant_of_the_loss(image_folder, tmp_path, small_network):
    namespace = {"__name__": "variant"}
    exec(example("README.md", "Change it"), namespace)
    loss = namespace["SinkhornLoss"](64, 32, 3)
    logits = torch.randn(2, 50, 4) / 10 + torch.tensor([0.3, 0.0, 0.0, 0.0])  # one prototype that most would choose
    assert (logits / 0.04).softmax(-1).mean((0, 1))[0] > 0.9
    p = loss.teacher_probs(logits, 0, 0.04)
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 50))
    assert p.mean((0, 1)).max() < 0.4
    main_selfpatch.train_dino(options("--epochs", 1, "--data_path", image_folder, "--output_dir", tmp_path),
                              namespace["SinkhornLoss"])
    assert load(tmp_path / "checkpoint.pth")["epoch"] == 1


def test_a_teacher_that_sees_other_colours(image_folder, tmp_path, small_network):
    namespace = {"__name__": "variant"}
    exec(example("docs/LIBRARY.md", "A teacher that sees other colours"), namespace)
    crops = [torch.randn(2, 3, 32, 32)] * 2
    teacher = build_networks("vit_pico", 8, 64, 32)[1]
    with torch.no_grad():
        plain = teacher.targets(crops)
        targets = namespace["OtherColoursLoss"](64, 32, 2).targets(teacher, crops)
    torch.testing.assert_close(targets.image.dense(), plain.image.dense())
    assert not torch.allclose(targets.patches[0].dense(), plain.patches[0].dense())
    main_selfpatch.train_dino(options("--epochs", 1, "--data_path", image_folder, "--output_dir", tmp_path),
                              namespace["OtherColoursLoss"])
    assert load(tmp_path / "checkpoint.pth")["epoch"] == 1
