"""Several processes on the CPU (Gloo): the same numbers as one, and every way to start them."""
import json
import os
import subprocess
import sys

import pytest
import torch
from forked import free_port, run_program, run_ranks
from golden_rules import set_weights
from networks import constant_run, small_wrapper
from repository import ROOT
from torch import nn

from main_selfpatch import share_gradients
from selfpatch.checkpoints.loading import load_backbone
from selfpatch.distributed.collectives import sync_batchnorms
from selfpatch.distributed.processes import leave_processes
from selfpatch.method.fused_loss import FusedDINOLoss
from selfpatch.method.losses import DINOLoss
from selfpatch.method.optim import get_params_groups
from selfpatch.method.selfpatch_head import MultiCropWrapper, PackedMultiCropWrapper, SelfPatchHead
from selfpatch.method.vision_transformer import DINOHead, vit_tiny
from selfpatch.pretraining.engine import train_step

pytestmark = pytest.mark.slow


def run_step(batch, use_bn=False, accum_steps=1, compiled=False, loss_class=FusedDINOLoss,
             wrapper_class=MultiCropWrapper, reduce_dtype="fp32", rank=0, world_size=1):
    """One SGD step on this rank's share of the batch: losses, centres, gradients and BatchNorm's statistics."""
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def wrapper():
        # larger weights than the initial ones, which BatchNorm would divide rounding by
        model = set_weights(small_wrapper(use_bn=use_bn), salt=0)
        model.__class__ = wrapper_class
        return sync_batchnorms(model, torch.device("cpu")) if world_size > 1 else model

    student, teacher = wrapper(), wrapper().requires_grad_(False)
    model = share_gradients(student, torch.device("cpu"), reduce_dtype) if world_size > 1 else student
    dino_loss = loss_class(12, 10, 4)
    for part in (student, teacher, dino_loss) if compiled else ():
        part.compile(dynamic=False, backend="aot_eager")
    run = constant_run(model, teacher, dino_loss, torch.optim.SGD(get_params_groups(student)), clip_grad=0,
                       accum_steps=accum_steps)
    share = [crop.chunk(world_size)[rank].chunk(accum_steps) for crop in batch]
    losses = train_step(run, zip(*share, strict=True))
    return {"losses": torch.stack(losses[:3]), "entropies": torch.stack(losses[3:]),
            "centres": dino_loss.state_dict(), "weights": student.state_dict(),
            "buffers": dict(student.named_buffers()),
            "grads": {name: p.grad for name, p in student.named_parameters() if p.grad is not None}}


CASES = {"fused": {}, "plain": {"loss_class": DINOLoss}, "BatchNorm": {"use_bn": True},
         "small batches": {"accum_steps": 2}, "plain, small batches": {"loss_class": DINOLoss, "accum_steps": 2},
         "compiled, small batches": {"accum_steps": 2, "compiled": True},
         "packed": {"wrapper_class": PackedMultiCropWrapper},
         "packed, small batches": {"wrapper_class": PackedMultiCropWrapper, "accum_steps": 2},
         "sums in bfloat16": {"reduce_dtype": "bf16"}}


def worker(batch, folder):
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for case, options in CASES.items():
        torch.save(run_step(batch, **options, rank=rank, world_size=2), f"{folder}/{case}.{rank}.pth")
    leave_processes()


def close(a, b, tolerance):
    """Whether the tensors agree to a share of their entries' size, and of the largest's.

    Below 1e-9 they do: the gradient of a key's bias is rounding alone.
    """
    atol = 1e-5 if tolerance == 1e-5 else tolerance * float(b.abs().max()) + 1e-9
    return torch.allclose(a, b, rtol=tolerance, atol=atol)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The batch, and the folder of what two processes made of it in every case."""
    torch.manual_seed(0)
    batch, folder = [torch.randn(4, 3, size, size) for size in (32, 32, 24, 24)], tmp_path_factory.mktemp("ranks")
    run_ranks(worker, batch, str(folder))
    return batch, folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_with_all_the_images(two_processes, case):
    batch, folder = two_processes
    first, second = (torch.load(folder / f"{case}.{rank}.pth") for rank in (0, 1))
    use_bn = CASES[case].get("use_bn", False)
    one = run_step(batch, use_bn)
    torch.testing.assert_close((first["losses"] + second["losses"]) / 2, one["losses"], rtol=1e-5, atol=1e-6)
    assert set(first["grads"]) == set(one["grads"])
    for part in ("centres", "grads", "buffers", "weights"):
        for name, ours in one[part].items():
            for rank in (first, second):
                rounded = case == "sums in bfloat16" and part in ("grads", "weights")
                assert close(rank[part][name], ours, 2**-7 if rounded else 1e-5), f"{part} {name}"
    if case.startswith("plain"):  # entropies are of a rank's own images: the two forms agree rank by rank
        counterpart = {"plain": "fused", "plain, small batches": "small batches"}[case]
        fused = [torch.load(folder / f"{counterpart}.{rank}.pth") for rank in (0, 1)]
        for rank, other in zip((first, second), fused, strict=True):
            torch.testing.assert_close(rank["entropies"], other["entropies"], rtol=1e-5, atol=1e-6)
    if case == "sums in bfloat16":
        assert all(torch.equal(grad, grad.bfloat16().float()) for grad in first["grads"].values())
    if use_bn:
        assert any("running_mean" in name for name in one["buffers"])


def command(image_folder, output, *words):
    return ["--arch", "vit_tiny", "--data_path", str(image_folder), "--output_dir", str(output), "--epoch", "1",
            "--warmup_epochs", "0", "--global_crops_size", "48", "--local_crops_size", "48",
            "--local_crops_number", "0",
            "--out_dim", "32", "--out_dim_selfpatch", "16", "--batch_size_per_gpu", "3", "--num_workers", "0",
            "--device", "cpu", *words]


@pytest.fixture
def another(tmp_path):
    """A folder with a package of the same name, as if installed: jobs of a checkout must not take that one."""
    (tmp_path / "installed" / "selfpatch").mkdir(parents=True)
    (tmp_path / "installed" / "selfpatch" / "__init__.py").write_text("raise SystemExit('another selfpatch')\n")
    return tmp_path / "installed"


def environment(**extra):
    kept = {k: v for k, v in os.environ.items()
            if not k.startswith("SLURM_") and k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    return kept | {"OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in extra.items()}


def check_run(output, processes, text):
    assert f"{processes} × 3 images per step on cpu in float32" in text
    assert text.count("done: 1 epochs") == 1  # one rank speaks
    assert json.loads((output / "log.txt").read_text())["epoch"] == 0
    student = torch.load(output / "checkpoint.pth", weights_only=True)["student"]
    assert all(name.startswith("module.") for name in student) == (processes > 1)
    published = MultiCropWrapper(vit_tiny(), SelfPatchHead(192, 3), DINOHead(192, 32), DINOHead(192, 16))
    (nn.DataParallel(published) if processes > 1 else published).load_state_dict(student)  # keys and shapes alone
    torch.testing.assert_close(load_backbone(output, "student").pos_embed, published.backbone.pos_embed)


@pytest.mark.parametrize("launcher", [
    ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],  # what torchrun runs
    pytest.param(["-m", "torch.distributed.launch", "--nproc_per_node=2", "--master_port={port}"],
                 marks=pytest.mark.long),
    pytest.param([], marks=pytest.mark.long)], ids=["torchrun", "launch", "python"])
def test_launchers(image_folder, tmp_path, another, launcher):
    launcher = [word.format(port=free_port()) for word in launcher]
    result = subprocess.run([sys.executable, *launcher, str(ROOT / "main_selfpatch.py"),
                             *command(image_folder, tmp_path)], cwd=tmp_path,
                            env=environment(PYTHONPATH=another), capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    check_run(tmp_path, 2 if launcher else 1, result.stdout)


def test_srun(image_folder, tmp_path):
    """Two tasks with the environment that srun gives them; MASTER_ADDR comes from the list of nodes."""
    tasks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "8",
              "SLURM_STEP_NODELIST": "localhost"} for rank in (0, 1)]
    outputs = run_program(ROOT / "main_selfpatch.py", *command(image_folder, tmp_path), "--port", free_port(),
                          envs=tasks, seconds=180)
    assert [status for status, *_ in outputs] == [0, 0], outputs
    check_run(tmp_path, 2, "".join(stdout for _, stdout, _ in outputs))


@pytest.mark.long
def test_submitit_job_runs(image_folder, tmp_path, another):
    """run_with_submitit.py, with submitit's own local executor in Slurm's place."""
    pytest.importorskip("submitit", reason="submitit is optional: pip install submitit")
    result = subprocess.run([sys.executable, str(ROOT / "run_with_submitit.py"), "--cluster", "local", "--ngpus", "0",
                             "--timeout", "5", "--wait", *command(image_folder, tmp_path)], cwd=tmp_path,
                            env=environment(PYTHONPATH=another), capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "checkpoint.pth").is_file()
