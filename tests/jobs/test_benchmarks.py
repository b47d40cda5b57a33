"""The benchmarks compare like with like, and say what they measured."""
import json

import pytest
import torch
from forked import run_program
from repository import ROOT

from selfpatch.method.training_run import build_networks
from selfpatch.pretraining.flops import flops_per_image


def run(script, *words, **env):
    """Exit status, stdout and stderr."""
    return run_program(ROOT / "benchmarks" / script, *words, envs=[env], seconds=300)[0]


@pytest.mark.long
def test_published_order_of_work_computes_the_same_step(tmp_path):
    """The first step's loss, stochastic depth included; and the figures of both ways."""
    status, _, stderr = run("train_step.py", "--arch", "vit_tiny", "--batch_size", 2, "--local_crops_number", 2,
                            "--device", "cpu", "--warmup", 0, "--steps", 1, "--plain", "--json",
                            tmp_path / "figures.json")
    assert status == 0, stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    ours, plain = figures["ours"], figures["plain"]
    assert ours["first_loss"] == pytest.approx(plain["first_loss"], rel=1e-5)
    assert "as published: backbone, head, loss, update" in plain["way"] and "published" not in ours["way"]
    assert ours["gflop_per_image"] == plain["gflop_per_image"] > 10
    assert min(ours["images_per_second"], ours["peak_gib"], ours["utilisation"]) > 0
    assert list(ours["stages"]) == ["teacher", "student", "loss", "backward", "update"]


def test_model_flops_are_the_known_ones():
    """168 GFLOP an image for ViT-S/16 with the published crops and heads."""
    with torch.device("meta"):
        network, _ = build_networks("vit_small")
    assert flops_per_image(network, [224] * 2 + [96] * 8) == pytest.approx(168e9, rel=0.01)


@pytest.mark.slow
def test_gpu_figures_need_a_gpu(tmp_path):
    status, _, stderr = run("gpu.py", "--output", tmp_path / "figures", CUDA_VISIBLE_DEVICES="")
    assert status == 2 and "no CUDA GPU" in stderr and stderr.count("\n") == 1
    assert not (tmp_path / "figures").exists()


def test_gpu_figures_are_read_from_what_the_parts_wrote(tmp_path, monkeypatch, capsys):
    import gpu
    way = {"seconds": 0.06, "images_per_second": 2000.0, "utilisation": 0.45, "peak_gib": 20.0}
    (tmp_path / "step.json").write_text(json.dumps({"ours": way, "plain": way | {"seconds": 0.3, "peak_gib": 50.0}}))
    (tmp_path / "jpegs.txt").write_text("".join(
        f"epoch {epoch}/2  step {step}/40  loss 1.0  {rate} images/s  ETA 0:00:00\n"
        for epoch, rates in ((0, (5.0, 1900.0)), (1, (900.0,) * 4 + (1880.0, 1900.0, 1920.0)))
        for step, rate in enumerate(rates)))
    gpu.table(tmp_path)
    out = capsys.readouterr().out
    assert "5.00" in out and "40%" in out and "95%" in out and "45.0%" in out


@pytest.mark.slow
def test_evaluations_are_measured_beside_the_plain_ways(tmp_path):
    status, stdout, stderr = run("evaluations.py", "--queries", 50, "--rows", 400, "--width", 32, "--k", 20, "--arch",
                                 "vit_tiny", "--images", 2, "--batch_size", 2, "--rounds", 1, "--device", "cpu",
                                 "--json", tmp_path / "figures.json")
    assert status == 0, stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["search"]["largest_difference"] < 1e-3 and figures["search"]["ratio"] > 0
    assert 0 < figures["extraction"]["share"] and "times as fast" in stdout
