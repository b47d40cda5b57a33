"""torch.hub finds the entry points of the checkout and loads checkpoints through them."""
from pathlib import Path

import pytest
import torch

import hubconf
from vision_transformer import vit_tiny

CHECKOUT = str(Path(__file__).parent.parent)


def hub(entry, **kwargs):
    return torch.hub.load(CHECKOUT, entry, source="local", **kwargs)


def test_entry_points_are_the_three_networks():
    entries = [name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")]
    assert entries == ["vit_tiny", "vit_small", "vit_base"]  # what torch.hub.list shows


@torch.no_grad()
def test_pretrained_file(tmp_path, capsys):
    source = vit_tiny(patch_size=8).eval()
    torch.save({"student": {f"module.backbone.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "run.pth")
    model = hub("vit_tiny", pretrained=str(tmp_path / "run.pth"), checkpoint_key="student", drop_path_rate=0.1)
    x = torch.randn(1, 3, 40, 48)
    assert torch.equal(model(x), source(x))
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    assert "key student, vit_tiny, patch size 8" in capsys.readouterr().out


@pytest.mark.parametrize("entry, width", [("vit_tiny", 192), ("vit_small", 384), ("vit_base", 768)])
def test_random_weights_without_a_file(entry, width, capsys):
    with torch.device("meta"):  # its shapes are enough
        model = hub(entry, patch_size=32)
    assert (model.embed_dim, model.patch_size, model.training) == (width, 32, False)
    assert f"random weights: {entry}, patch size 32" in capsys.readouterr().out


def test_file_of_another_network_is_an_error(tmp_path):
    torch.save(vit_tiny().state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(ValueError, match="vit_base contradicts .*tiny.pth.* vit_tiny"):
        hub("vit_base", pretrained=str(tmp_path / "tiny.pth"))
    with pytest.raises(ValueError, match="8 contradicts .*tiny.pth.* 16"):
        hub("vit_tiny", pretrained=str(tmp_path / "tiny.pth"), patch_size=8)
    with pytest.raises(ValueError, match="cannot be read"):
        hub("vit_tiny", pretrained=str(tmp_path / "none.pth"))
