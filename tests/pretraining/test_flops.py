"""What the model-FLOPs utilisation is of: the operations of a step, and the peaks of known GPUs."""
import pytest
import torch

from selfpatch.method.training_run import build_networks
from selfpatch.pretraining.flops import flops_per_image, peak_tflops


def test_model_flops_follow_from_the_networks():
    def flops(sizes=(224,) * 2 + (96,) * 8, **options):
        with torch.device("meta"):
            return flops_per_image(build_networks("vit_small", **options)[0], sizes)

    known, bottleneck = flops(), 256
    assert flops(out_dim=32768) == known - 32768 * 2 * bottleneck * (3 * 10 + 2)
    dino = flops(use_patches=False)
    assert dino < 0.7 * known and dino == flops(use_patches=False, out_dim_selfpatch=1)
    assert flops((224, 224)) < known


@pytest.mark.parametrize("name, peak", [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA L40S", 362),
                                        ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A10G", 0), ("NVIDIA L4", 121),
                                        ("Tesla V100-SXM2-16GB", 125)])
def test_peaks_of_gpus_by_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_tflops(torch.device("cuda", 0)) == peak and peak_tflops(torch.device("cpu")) == 0
