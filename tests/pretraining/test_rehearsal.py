"""The GPU path under a CUDA runtime that computes nothing and counts (see benchmarks/rehearse_gpu.py).

    REHEARSE -m pytest -n0 tests/pretraining/test_rehearsal.py
"""
import argparse
import gc

import pytest
import torch
from davis_folder import make_davis
from small_job import SMALL, load

null = pytest.importorskip("null_cuda", reason="not under a CUDA runtime that counts")

from rehearse_gpu import check_capture, count_step, make_way, take_step  # noqa: E402

import eval_video_segmentation  # noqa: E402
from main_selfpatch import get_args_parser, train_dino  # noqa: E402
from selfpatch.errors import ConfigError  # noqa: E402
from selfpatch.pretraining import engine  # noqa: E402

ARGS = argparse.Namespace(arch="vit_small", patch_size=16, batch_size=16, accum_steps=1, local_crops_number=8,
                          precision="bf16", compile="off", checkpoint_activations="", pack_crops="auto")


@pytest.fixture(autouse=True)
def memory_of_other_tests():
    """None is left when a test begins."""
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()


@pytest.fixture
def way():
    return make_way(ARGS)


def test_no_operation_of_a_step_waits_for_the_device(way):
    engine.train_step(way.run, [way.crops])
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.train_step(way.run, [way.crops])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_does_not_grow(way):
    for _ in range(2):
        engine.train_step(way.run, [way.crops])
    torch.cuda.reset_peak_memory_stats()
    engine.train_step(way.run, [way.crops])
    allocated, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    null.reset()
    for _ in range(10):
        engine.train_step(way.run, [way.crops])
    assert (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) == (allocated, peak)
    assert null.counts()["mallocs"] == 0


@pytest.mark.parametrize("changes, kernels, gib", [
    ({}, 1600, 19.2), ({"checkpoint_activations": "block"}, 1700, 6.4), ({"checkpoint_activations": "mlp"}, 1650, 12.5),
    ({"checkpoint_activations": "attention"}, 1650, 14.7), ({"pack_crops": "off"}, 2950, 18.7)])
def test_the_published_step(changes, kernels, gib):
    """ViT-S/16, 128 images: launches, memory, and the bf16 products that the step's arithmetic needs."""
    counts = count_step(ARGS, batch_size=128, **changes)
    assert counts["kernels"] < kernels and counts["peak_gib"] < gib and counts["waits"] == 0
    assert counts["flops_fp32"] < 1e-5 * counts["flops"]
    if not changes:
        assert counts["flops"] / 128 == pytest.approx(158.0e9, rel=0.01)
        assert counts["flops"] < 0.94 * count_step(ARGS, plain=[], batch_size=128)["flops"]


def test_compiled_graphs_are_whole_and_last_for_the_run():
    """No break, no wait, and nothing compiled anew in the second epoch."""
    counts = count_step(ARGS, arch="vit_pico", compile="on")
    assert counts["graphs"] == 5 and not counts["graph_breaks"] and not counts["waits"]
    assert 0 < counts["compiled_kernels"] < counts["kernels"] and counts["compiled_gb"] > 1
    way = make_way(ARGS, arch="vit_pico", compile="on")
    take_step(way)
    way.run.step = way.run.steps_per_epoch
    with torch._dynamo.config.patch(error_on_recompile=True):
        take_step(way)


def test_small_batches_cost_their_own_memory():
    assert count_step(ARGS, accum_steps=4)["peak_gib"] < 1.1 * count_step(ARGS)["peak_gib"]


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_whole_job_from_jpegs_to_a_resumed_checkpoint(image_folder, tmp_path, monkeypatch, precision,
                                                          small_network):
    # its answer would be 0 here, which means no
    monkeypatch.setattr("selfpatch.pretraining.loop.check_weights", lambda _: None)
    words = [*SMALL, "--device", "cuda", "--compile", "off", "--precision", precision, "--num_workers", "2",
             "--data_path", str(image_folder), "--output_dir", str(tmp_path)]
    for epochs in (1, 2):
        train_dino(get_args_parser().parse_args([*words, "--epochs", str(epochs)]))
        assert load(tmp_path / "checkpoint.pth")["epoch"] == epochs


def test_davis_in_bf16(tmp_path, monkeypatch):
    # the number of rows would be whatever lies in memory
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda x: x.new_empty(0, x.dim(), dtype=torch.long))
    make_davis(tmp_path / "data", "a")
    monkeypatch.setattr("sys.argv", [
        "eval_video_segmentation.py", "--data_path", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"),
        "--random_weights", "--device", "cuda", "--precision", "bf16", "--no_score"])
    assert not eval_video_segmentation.main(eval_video_segmentation.get_args_parser().parse_args())
    assert list((tmp_path / "out" / "a").glob("*.png"))


def test_cuda_graphs_replay_what_is_compiled():
    """The last test: a runtime that cannot record may be left within a recording."""
    try:
        check_capture()
    except ConfigError as error:
        pytest.skip(str(error))
    counts = [count_step(ARGS, arch="vit_pico", compile="reduce-overhead", accum_steps=steps) for steps in (1, 3)]
    assert counts[0]["kernels"] < 200 and counts[1]["kernels"] < 700 and not counts[0]["waits"] + counts[1]["waits"]
