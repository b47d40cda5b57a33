"""The README's Python examples, as printed."""
import re

import pytest
import torch
from repository import ROOT
from small_job import load, options

import main_selfpatch

README = (ROOT / "README.md").read_text()
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


def example(heading):
    """The Python block of a section."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def test_two_steps_in_a_notebook(image_folder, capsys):
    code = example("In a notebook")
    assert "/path/to/images" in code
    namespace = {}
    exec(code.replace("/path/to/images", str(image_folder)), namespace)
    assert capsys.readouterr().out.count("Losses(total=") == 2
    assert namespace["run"].step == 2


def test_a_variant_of_the_loss(image_folder, tmp_path, small_network):
    namespace = {"__name__": "variant"}
    exec(example("Changing the loss"), namespace)
    loss = namespace["SinkhornLoss"](64, 32, 3)
    logits = torch.randn(2, 50, 4) / 10 + torch.tensor([0.3, 0.0, 0.0, 0.0])  # one prototype that most would choose
    assert (logits / 0.04).softmax(-1).mean((0, 1))[0] > 0.9
    p = loss.teacher_probs(logits, 0, 0.04)
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 50))
    assert p.mean((0, 1)).max() < 0.4
    main_selfpatch.train_dino(options("--epochs", 1, "--data_path", image_folder, "--output_dir", tmp_path),
                              namespace["SinkhornLoss"])
    assert load(tmp_path / "checkpoint.pth")["epoch"] == 1
