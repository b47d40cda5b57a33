"""Pretrain a Vision Transformer with SelfPatch: DINO plus a patch-level loss (Yun et al. 2022, arXiv 2206.07990).

    python main_selfpatch.py --arch vit_small --data_path imagenet/train --output_dir runs/one     # one GPU, or the CPU
    torchrun --nproc_per_node=8 main_selfpatch.py --arch vit_small --data_path imagenet/train --output_dir runs/eight
    srun --ntasks-per-node=8 --gpus-per-node=8 python main_selfpatch.py ...                        # Slurm

Run the same command again and it goes on from output_dir/checkpoint.pth.
"""
import argparse
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from torch import nn
from torchvision.datasets import ImageFolder

import utils
from augmentations import DataAugmentationDINO, UnreadableImage  # noqa: F401 (people look for them here)
from batchnorm import sync_batchnorms
from data import CropLoader, build_dataset
from engine import health_warnings, train_one_epoch
from errors import run_main
from losses import DINOLoss
from options import check_args, get_args_parser, images_per_step
from selfpatch_head import MultiCropWrapper, SelfPatchHead
from vision_transformer import ARCHS, DINOHead


def build_models(args: argparse.Namespace) -> tuple[MultiCropWrapper, MultiCropWrapper]:
    """Student and teacher on args.device; the teacher is not yet a copy."""
    def wrapper(drop_path_rate: float, norm_last_layer: bool) -> MultiCropWrapper:
        backbone = ARCHS[args.arch](patch_size=args.patch_size, drop_path_rate=drop_path_rate)
        heads = [DINOHead(backbone.embed_dim, out_dim, args.use_bn_in_head, norm_last_layer)
                 for out_dim in (args.out_dim, args.out_dim_selfpatch)]
        model = MultiCropWrapper(backbone, SelfPatchHead(backbone.embed_dim, backbone.num_heads, args.k_num), *heads)
        if not args.patch_loss_weight:
            model.p_head.requires_grad_(False)  # kept for the checkpoint's layout, but never run
        if args.world_size > 1 and args.use_bn_in_head:
            model = sync_batchnorms(model, args.device)
        return model.to(args.device)

    return wrapper(args.drop_path_rate, args.norm_last_layer), wrapper(0.0, True).requires_grad_(False)


def build_optimizer(args: argparse.Namespace, student: nn.Module) -> torch.optim.Optimizer:
    groups = utils.get_params_groups(student)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=args.device.type in ("cuda", "cpu"))
    if args.optimizer == "sgd":
        # not fused: that one stumbles over last layers whose momentum begins an epoch late
        return torch.optim.SGD(groups, lr=0, momentum=0.9, foreach=True)
    return utils.LARS(groups)


def build_schedules(args: argparse.Namespace, steps: int) -> dict:
    """Learning rate, weight decay and teacher momentum, one value an iteration, for epochs of so many steps."""
    peak = args.lr * images_per_step(args) / 256
    schedules = {"lr": utils.cosine_scheduler(peak, args.min_lr, args.epochs, steps, args.warmup_epochs),
                 "wd": utils.cosine_scheduler(args.weight_decay, args.weight_decay_end, args.epochs, steps),
                 "momentum": utils.cosine_scheduler(args.momentum_teacher, 1, args.epochs, steps)}
    # plain floats: the optimiser's state takes them in, and numpy's would keep weights_only from reading it
    return {name: values.tolist() for name, values in schedules.items()}


def compiles(args: argparse.Namespace) -> bool:
    """Whether --compile says so; auto: on CUDA, where there is what the compiler needs."""
    if args.compile == "off" or (args.compile == "auto" and args.device.type != "cuda"):
        return False
    missing = ""
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        missing = "there is no C++ compiler here: install g++, or set CXX"
    elif args.device.type == "cuda" and importlib.util.find_spec("triton") is None:
        missing = "torch's Triton is not installed"
    elif args.device.type == "cuda" and torch.cuda.get_device_capability(args.device) < (7, 0):
        missing = "it needs a GPU of compute capability 7.0 or more"
    if missing and args.compile == "on":
        utils.fail(f"--compile on: {missing}")
    if missing and utils.is_main_process():
        print(f"not compiled, which is slower: {missing}")
    return not missing


def compile_parts(args: argparse.Namespace, *parts: nn.Module) -> None:
    """Compile networks and loss in place: names in their state dicts stay."""
    if args.checkpoint_activations:
        torch._dynamo.config.optimize_ddp = False  # older torch cannot split a graph that has checkpoints in it
    for part in parts:
        part.compile(dynamic=False)  # the two resolutions never change


def autocast_dtype(args: argparse.Namespace) -> torch.dtype:
    """The precision of the networks' matrix products; float32 is no autocast at all."""
    if args.precision == "fp16" and args.device.type == "mps":
        utils.fail("--precision fp16 needs a GradScaler, which MPS has not: use fp32 or bf16")
    if args.precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]
    if not args.use_fp16 or args.device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def resume(path: Path, args: argparse.Namespace, **objects) -> int:
    """Load what path has into the objects; the epoch to begin with."""
    try:
        start_epoch = utils.restart_from_checkpoint(path, **objects)
    except ValueError as error:
        utils.fail(f"{error}: give the options of that run, or another --output_dir")
    if args.world_size > 1:
        epochs = [0] * args.world_size
        torch.distributed.all_gather_object(epochs, start_epoch)
        if len(set(epochs)) > 1:
            utils.fail(f"the processes found checkpoints of different epochs ({sorted(set(epochs))}) in --output_dir "
                       f"{args.output_dir}: it must be one folder that all machines share")
    return start_epoch


def pretrain(args: argparse.Namespace) -> None:
    """Set up, resume, train, save."""
    check_args(args)
    utils.init_distributed_mode(args)
    dtype = autocast_dtype(args)
    compiled = compiles(args)
    loader = CropLoader(args, build_dataset(args), compiled)
    utils.fix_random_seeds(args.seed)
    torch.backends.cudnn.benchmark = True
    if args.device.type == "cpu":
        utils.keep_freed_memory()

    student, teacher = build_models(args)
    student_alone = student
    student.backbone.checkpoint_activations = args.checkpoint_activations
    if args.world_size > 1:
        student = nn.parallel.DistributedDataParallel(
            student, device_ids=[args.device] if args.device.type == "cuda" else None, gradient_as_bucket_view=True)
    teacher.load_state_dict(student_alone.state_dict())
    dino_loss = DINOLoss(args.out_dim, args.out_dim_selfpatch, 2 + args.local_crops_number, args.warmup_teacher_temp,
                         args.teacher_temp, args.warmup_teacher_temp_epochs, args.epochs,
                         patch_loss_weight=args.patch_loss_weight).to(args.device)
    if compiled:
        compile_parts(args, student_alone, teacher, dino_loss)
    optimizer = build_optimizer(args, student_alone)
    scaler = torch.amp.GradScaler(args.device.type, enabled=dtype == torch.float16)
    schedules = build_schedules(args, len(loader) // args.accum_steps)

    output = Path(args.output_dir)
    start_epoch = resume(output / "checkpoint.pth", args, student=student_alone, teacher=teacher, optimizer=optimizer,
                         dino_loss=dino_loss, fp16_scaler=scaler)
    announce(args, loader.dataset, student_alone, dtype, compiled, start_epoch)
    log = RunLog(output, start_epoch, args.tensorboard) if utils.is_main_process() else None
    for epoch in range(start_epoch, args.epochs):
        # seeds that depend on the epoch alone: a resumed run draws what the uninterrupted one would have drawn
        utils.fix_random_seeds(args.seed, args.rank, epoch)
        loader.sampler.set_epoch(epoch)
        stats = train_one_epoch(student, teacher, dino_loss, loader, optimizer, schedules, epoch, scaler, dtype, args)
        if not utils.all_finite(student_alone):
            sys.exit(f"the last step of epoch {epoch} made weights NaN or infinite, so they are not saved: "
                     "the run goes on from the epoch before; try a smaller --lr or --clip_grad")
        state = {"student": student.state_dict(), "teacher": teacher.state_dict(), "optimizer": optimizer.state_dict(),
                 "epoch": epoch + 1, "args": plain_args(args), "dino_loss": dino_loss.state_dict(),
                 "fp16_scaler": scaler.state_dict()}
        utils.save_on_master(state, output / "checkpoint.pth")
        if args.saveckp_freq and epoch % args.saveckp_freq == 0:
            utils.save_on_master(state, output / f"checkpoint{epoch:04}.pth")
        if log:
            log.write(stats, epoch)
            for warning in health_warnings(stats, epoch, args):
                print(f"warning: {warning}", flush=True)
    if log:
        print(f"done: {args.epochs} epochs, {output / 'checkpoint.pth'}")


def train_dino(args: argparse.Namespace) -> None:
    """The whole job, with the one error that only comes up on the way told in one line."""
    try:
        pretrain(args)
    except UnreadableImage as error:
        # a worker's error comes with its traceback, whose last line begins with the class
        line = str(error).splitlines()[-1].removeprefix("augmentations.UnreadableImage: ")
        sys.exit(f"main_selfpatch.py: error: {line}")
    finally:
        if utils.is_distributed():
            torch.distributed.destroy_process_group()


def announce(args: argparse.Namespace, dataset: ImageFolder, student: nn.Module, dtype: torch.dtype, compiled: bool,
             start_epoch: int) -> None:
    if utils.is_main_process():
        small_batches = f" × {args.accum_steps}" if args.accum_steps > 1 else ""
        size = sum(p.numel() for p in student.backbone.parameters()) / 1e6
        print(f"{args.arch}/{args.patch_size} ({size:.1f} M parameters), {len(dataset)} images in "
              f"{len(dataset.classes)} folders, {args.world_size} × {args.batch_size_per_gpu}{small_batches} images a "
              f"step on {args.device.type} in {str(dtype).removeprefix('torch.')}"
              f"{', compiled (the first steps take minutes)' if compiled else ''}; "
              + (f"going on after epoch {start_epoch - 1}" if start_epoch else "starting anew"), flush=True)


def plain_args(args: argparse.Namespace) -> dict:
    """The options as plain values, which torch.load(weights_only=True) reads."""
    return {name: str(value) if isinstance(value, (torch.device, Path)) else value
            for name, value in vars(args).items()}


class RunLog:
    """log.txt, one JSON object a line and epoch, and TensorBoard curves where asked for."""

    def __init__(self, output: Path, start_epoch: int, tensorboard: bool):
        self.path, self.board = output / "log.txt", None
        if self.path.is_file() and not self.path.read_text().endswith("\n"):
            with open(self.path, "a") as file:  # a run that was killed while writing left half a line
                file.write("\n")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(output / "tensorboard", purge_step=start_epoch)

    def write(self, stats: dict[str, float], epoch: int) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({f"train_{name}": value for name, value in stats.items()} | {"epoch": epoch}) + "\n")
        if self.board:
            for name, value in stats.items():
                self.board.add_scalar(f"train/{name}", value, epoch)
            self.board.flush()


def main() -> None:
    parser = utils.ArgumentParser(description=__doc__.split("\n\n")[0], parents=[get_args_parser()],
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    train_dino(parser.parse_args())


if __name__ == "__main__":
    run_main(main)
