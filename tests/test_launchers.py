"""Several processes on the CPU (Gloo): the same numbers as one, and every way to start them."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from golden_rules import set_weights
from networks import small_wrapper
from torch import nn

import utils
from batchnorm import sync_batchnorms
from checkpoints import load_backbone
from engine import train_step
from losses import DINOLoss
from main_selfpatch import MultiCropWrapper
from selfpatch_head import SelfPatchHead
from vision_transformer import DINOHead, vit_tiny

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run_step(batch, use_bn, accum_steps=1, compiled=False, rank=0, world_size=1):
    """One SGD step on this rank's share of the batch: losses, centres, gradients and BatchNorm's statistics."""
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def wrapper():
        # larger weights than the initial ones, which BatchNorm would divide rounding by
        model = set_weights(small_wrapper(use_bn=use_bn), salt=0)
        return sync_batchnorms(model, torch.device("cpu")) if world_size > 1 else model

    student, teacher = wrapper(), wrapper().requires_grad_(False)
    model = nn.parallel.DistributedDataParallel(student, gradient_as_bucket_view=True) if world_size > 1 else student
    dino_loss = DINOLoss(12, 10, 4, 0.04, 0.04, 0, 1)
    for part in (student, teacher, dino_loss) if compiled else ():
        part.compile(dynamic=False, backend="aot_eager")
    optimizer = torch.optim.SGD(utils.get_params_groups(student), lr=0.1)
    share = [crop.chunk(world_size)[rank].chunk(accum_steps) for crop in batch]
    losses = train_step(model, teacher, dino_loss, optimizer, zip(*share, strict=True), epoch=0, momentum=0.9,
                        clip_grad=0, freeze_last_layer=0, accum_steps=accum_steps)
    return {"losses": torch.stack(losses[:3]), "centres": dino_loss.state_dict(), "weights": student.state_dict(),
            "buffers": dict(student.named_buffers()),
            "grads": {name: p.grad for name, p in student.named_parameters() if p.grad is not None}}


def worker(rank, world_size, port, batch, use_bn, accum_steps, compiled, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.distributed.init_process_group("gloo")
    torch.save(run_step(batch, use_bn, accum_steps, compiled, rank, world_size), f"{folder}/{rank}.pth")
    torch.distributed.destroy_process_group()


def free_port():
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.mark.parametrize("use_bn, accum_steps, compiled", [
    (False, 1, False), (True, 1, False), (False, 2, False), (False, 2, True)])
def test_two_processes_equal_one_with_all_the_images(tmp_path, use_bn, accum_steps, compiled):
    batch = [torch.randn(4, 3, size, size) for size in (32, 32, 24, 24)]
    mp.spawn(worker, (2, free_port(), batch, use_bn, accum_steps, compiled, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1))
    one = run_step(batch, use_bn)
    torch.testing.assert_close((first["losses"] + second["losses"]) / 2, one["losses"], rtol=1e-5, atol=1e-6)
    assert set(first["grads"]) == set(one["grads"])
    for part in ("centres", "grads", "buffers", "weights"):
        for name, ours in one[part].items():
            for rank in (first, second):
                torch.testing.assert_close(rank[part][name], ours, rtol=1e-5, atol=1e-5, msg=f"{part} {name}")
    if use_bn:
        assert any("running_mean" in name for name in one["buffers"])


def command(image_folder, output, *words):
    return ["--arch", "vit_tiny", "--data_path", str(image_folder), "--output_dir", str(output), "--epoch", "1",
            "--warmup_epochs", "0", "--global_crops_size", "48", "--local_crops_size", "48",
            "--local_crops_number", "0",
            "--out_dim", "32", "--out_dim_selfpatch", "16", "--batch_size_per_gpu", "3", "--num_workers", "0",
            "--device", "cpu", *words]


def environment(**extra):
    kept = {k: v for k, v in os.environ.items()
            if not k.startswith("SLURM_") and k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    return kept | {"OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in extra.items()}


def check_run(output, processes, text):
    assert f"{processes} × 3 images a step on cpu in float32" in text
    assert text.count("done: 1 epochs") == 1  # one rank speaks
    assert json.loads((output / "log.txt").read_text())["epoch"] == 0
    student = torch.load(output / "checkpoint.pth", weights_only=True)["student"]
    assert all(name.startswith("module.") for name in student) == (processes > 1)
    published = MultiCropWrapper(vit_tiny(), SelfPatchHead(192, 3), DINOHead(192, 32), DINOHead(192, 16))
    (nn.DataParallel(published) if processes > 1 else published).load_state_dict(student)  # keys and shapes alone
    torch.testing.assert_close(load_backbone(output, "student").pos_embed, published.backbone.pos_embed)


@pytest.mark.parametrize("launcher", [
    ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],  # what torchrun runs
    ["-m", "torch.distributed.launch", "--nproc_per_node=2", "--master_port={port}"],
    []], ids=["torchrun", "launch", "python"])
def test_launchers(image_folder, tmp_path, launcher):
    launcher = [word.format(port=free_port()) for word in launcher]
    result = subprocess.run([sys.executable, *launcher, str(ROOT / "main_selfpatch.py"),
                             *command(image_folder, tmp_path)], cwd=tmp_path, env=environment(),
                            capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    check_run(tmp_path, 2 if launcher else 1, result.stdout)


def test_srun(image_folder, tmp_path):
    """Two tasks with the environment that srun gives them; MASTER_ADDR comes from the list of nodes."""
    words, port = command(image_folder, tmp_path), free_port()
    tasks = [subprocess.Popen([sys.executable, str(ROOT / "main_selfpatch.py"), *words, "--port", port], text=True,
                              env=environment(SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_STEP_NUM_TASKS=2,
                                              SLURM_NTASKS=8, SLURM_STEP_NODELIST="localhost"),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in (0, 1)]
    outputs = [task.communicate(timeout=180) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    check_run(tmp_path, 2, "".join(stdout for stdout, _ in outputs))


def test_submitit_job_runs(image_folder, tmp_path):
    """run_with_submitit.py, with submitit's own local executor in Slurm's place."""
    pytest.importorskip("submitit", reason="submitit is optional: pip install submitit")
    result = subprocess.run([sys.executable, str(ROOT / "run_with_submitit.py"), "--cluster", "local", "--ngpus", "0",
                             "--timeout", "5", "--wait", *command(image_folder, tmp_path)], cwd=tmp_path,
                            env=environment(), capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "checkpoint.pth").is_file()
