"""Pretrain a Vision Transformer with SelfPatch: DINO plus a patch-level loss (Yun et al. 2022, arXiv 2206.07990).

    python main_selfpatch.py --arch vit_small --data_path imagenet/train --output_dir runs/one     # one GPU, or the CPU
    torchrun --nproc_per_node=8 main_selfpatch.py --arch vit_small --data_path imagenet/train --output_dir runs/eight
    srun --ntasks-per-node=8 --gpus-per-node=8 python main_selfpatch.py ...                        # Slurm

The same command again continues from output_dir/checkpoint.pth.
"""
import argparse
import errno
import importlib.util
import os
import shutil
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn

from augmentations import DataAugmentationDINO  # noqa: F401 (DINO's users import it from here)
from batchnorm import sync_batchnorms
from checkpoint_files import CheckpointError
from data import build_dataset
from distributed import Processes, init_distributed_mode, is_distributed, is_main_process, keep_freed_memory
from engine import health_warnings, train_one_epoch
from errors import ArgumentParser, ConfigError, TrainingError, run_main
from fused_loss import FusedDINOLoss
from image_files import UnreadableImage
from loader import CropLoader
from logger import RunLog
from losses import DINOLoss
from optim import all_finite, build_optimizer
from options import check_args, get_args_parser
from selfpatch_head import MultiCropWrapper  # noqa: F401
from training_run import TrainingRun, build_networks, build_schedules
from utils import fix_random_seeds, restart_from_checkpoint, save_on_master

# ----------------------------------------------------------------------------------------------------------------------
# From options to what they mean on this machine


def choose_augment(augment: str, device: torch.device) -> str:
    """Where --augment auto augments: on the device; according to benchmarks/data.py that is faster on CPUs too.

    MPS has not been measured, and stays with PIL.
    """
    if augment != "auto":
        return augment
    return "device" if device.type in ("cuda", "cpu") else "pil"


def choose_precision(precision: str, use_fp16: bool, device: torch.device) -> torch.dtype:
    """Autocast's dtype for --precision and --use_fp16; float32 means no autocast."""
    if precision == "fp16" and device.type == "mps":
        raise ConfigError("--precision fp16 needs a GradScaler, which MPS does not have: use fp32 or bf16")
    if precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if not use_fp16 or device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def choose_compile(choice: str, device: torch.device) -> bool:
    """Whether to compile, by --compile; auto does on CUDA, if the compiler has what it needs."""
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        return False
    missing = ""
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        missing = "there is no C++ compiler here: install g++, or set CXX"
    elif device.type == "cuda" and importlib.util.find_spec("triton") is None:
        missing = "torch's Triton is not installed"
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        missing = "it needs a GPU of compute capability 7.0 or more"
    if missing and choice == "on":
        raise ConfigError(f"--compile on: {missing}")
    if missing and is_main_process():
        print(f"not compiled, which is slower: {missing}")
    return not missing


def choose_loss(fused_loss: str, loss_class: type[DINOLoss] | None) -> type[DINOLoss]:
    """The class of the loss, by --fused_loss; a class of the caller's own is used as it is."""
    if loss_class is None:
        return DINOLoss if fused_loss == "off" else FusedDINOLoss
    if fused_loss == "on" and not issubclass(loss_class, FusedDINOLoss):
        raise ConfigError(f"--fused_loss on: {loss_class.__name__} has no fused form, leave the option out")
    return loss_class


# ----------------------------------------------------------------------------------------------------------------------
# The job


def images_per_step(args: argparse.Namespace, world_size: int) -> int:
    """Images of one step of the optimiser, over all small batches and ranks."""
    return args.batch_size_per_gpu * args.accum_steps * world_size


def build_loader(args: argparse.Namespace, processes: Processes, compiled: bool) -> CropLoader:
    dataset = build_dataset(args.data_path, args.global_crops_scale, args.local_crops_scale, args.local_crops_number,
                            args.global_crops_size, args.local_crops_size,
                            choose_augment(args.augment, processes.device))
    if len(dataset) < images_per_step(args, processes.world_size):
        raise ConfigError(
            f"--data_path {args.data_path} has {len(dataset)} images, fewer than the "
            f"{images_per_step(args, processes.world_size)} of one step ({args.batch_size_per_gpu} × "
            f"{args.accum_steps} small batches × {processes.world_size} processes): lower --batch_size_per_gpu or "
            "--accum_steps")
    return CropLoader(dataset, args.batch_size_per_gpu, args.num_workers, processes.device, processes.rank,
                      processes.world_size, args.seed, compiled, args.max_bad_images)


def build_run(args: argparse.Namespace, processes: Processes, steps_per_epoch: int, compiled: bool = False,
              loss_class: type[DINOLoss] = FusedDINOLoss) -> TrainingRun:
    """Networks, loss, optimiser and schedules of the options, at step 0, on the device."""
    device, distributed = processes.device, processes.world_size > 1
    networks = build_networks(args.arch, args.patch_size, args.out_dim, args.out_dim_selfpatch, args.k_num,
                              args.norm_last_layer, args.use_bn_in_head, args.drop_path_rate,
                              use_patches=args.patch_loss_weight > 0)
    if distributed and args.use_bn_in_head:
        networks = [sync_batchnorms(network, device) for network in networks]
    student, teacher = (network.to(device) for network in networks)
    student.backbone.checkpoint_activations = args.checkpoint_activations
    dino_loss = loss_class(args.out_dim, args.out_dim_selfpatch, 2 + args.local_crops_number,
                           args.warmup_teacher_temp, args.teacher_temp, args.warmup_teacher_temp_epochs, args.epochs,
                           patch_loss_weight=args.patch_loss_weight).to(device)
    optimizer = build_optimizer(student, args.optimizer)
    if compiled:
        if args.checkpoint_activations:
            torch._dynamo.config.optimize_ddp = False  # older torch cannot split a graph that has checkpoints in it
        # plain losses stay as they are: they would be compiled anew at every epoch
        for part in (student, teacher, *[dino_loss] * isinstance(dino_loss, FusedDINOLoss)):
            part.compile(dynamic=False)  # the two resolutions never change
    if distributed:
        student = nn.parallel.DistributedDataParallel(
            student, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    schedules = build_schedules(args.epochs, steps_per_epoch,
                                args.lr * images_per_step(args, processes.world_size) / 256, args.min_lr,
                                args.warmup_epochs, args.weight_decay, args.weight_decay_end, args.momentum_teacher)
    return TrainingRun(student, teacher, dino_loss, optimizer, schedules,
                       choose_precision(args.precision, args.use_fp16, device), args.clip_grad,
                       args.freeze_last_layer, args.accum_steps)


def resume(run: TrainingRun, output_dir: str, world_size: int) -> None:
    """Continue from output_dir/checkpoint.pth where there is one, on all ranks alike."""
    try:
        restart_from_checkpoint(Path(output_dir) / "checkpoint.pth", run)
    except ValueError as error:
        raise ConfigError(f"{error}: give the options of that run, or another --output_dir") from None
    if world_size > 1:
        epochs = [0] * world_size
        torch.distributed.all_gather_object(epochs, run.epoch)
        if len(set(epochs)) > 1:
            raise ConfigError(f"the processes found checkpoints of different epochs ({sorted(set(epochs))}) in "
                              f"--output_dir {output_dir}: it must be one folder that all machines share")


def pretrain(args: argparse.Namespace, loss_class: type[DINOLoss] | None = None) -> None:
    """Set up, resume, train, save."""
    check_args(args)
    loss_class = choose_loss(args.fused_loss, loss_class)
    processes = init_distributed_mode(args.device, args.local_rank, args.port, args.dist_url,
                                      timedelta(minutes=args.dist_timeout))
    compiled = choose_compile(args.compile, processes.device)
    loader = build_loader(args, processes, compiled)
    fix_random_seeds(args.seed)
    torch.backends.cudnn.benchmark = True
    if processes.device.type == "cpu":
        keep_freed_memory()
    run = build_run(args, processes, len(loader) // args.accum_steps, compiled, loss_class)
    resume(run, args.output_dir, processes.world_size)

    output = Path(args.output_dir)
    if is_main_process():
        print(start_line(args, processes, loader, run, compiled), flush=True)
    log = RunLog(output, run.epoch, args.tensorboard) if is_main_process() else None
    for epoch in range(run.epoch, args.epochs):
        # seeds that depend on the epoch alone: a resumed run draws what the uninterrupted one would have drawn
        fix_random_seeds(args.seed, processes.rank, epoch)
        loader.sampler.set_epoch(epoch)
        stats = train_one_epoch(run, loader, args.log_every)
        if not all_finite(run.student_module):
            raise TrainingError(f"the last step of epoch {epoch} made weights NaN or infinite, so they are not saved: "
                                "the same command continues from the epoch before; try a smaller --lr or --clip_grad")
        state = run.state_dict() | {"args": plain_args(args, processes.world_size)}
        save(state, output / "checkpoint.pth")
        if args.saveckp_freq and epoch % args.saveckp_freq == 0:
            save(state, output / f"checkpoint{epoch:04}.pth")
        record_bad_images(loader, output / "bad_images.txt")
        if log:
            log.write(stats, epoch)
            for warning in health_warnings(stats, run.dino_loss, epoch >= args.warmup_epochs, args.batch_size_per_gpu):
                print(f"warning: {warning}", flush=True)
    if log:
        print(f"done: {args.epochs} epochs, {output / 'checkpoint.pth'}")


def record_bad_images(loader: CropLoader, path: Path) -> None:
    """Write what all ranks could not read to path, one line per image, if there is anything; rank 0 says so."""
    errors = [loader.bad_images]
    if is_distributed():
        errors = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(errors, loader.bad_images)
    loader.bad_images = set().union(*errors)  # from here on every rank counts what all of them have found
    if loader.bad_images and is_main_process():
        encoding = {"encoding": "utf-8", "errors": "surrogateescape"}  # as file names are read
        try:
            # a resumed run adds to the list of the run before
            earlier = path.read_text(**encoding).splitlines() if path.is_file() else ()
            lines = sorted(loader.bad_images.union(earlier))
            path.write_text("".join(f"{line}\n" for line in lines), **encoding)
        except OSError as error:
            raise TrainingError(f"cannot write {path} ({error.strerror}): make room and run the same command "
                                "again") from None
        print(f"warning: {len(loader.bad_images)} of {len(loader.dataset)} images cannot be read and are replaced, "
              f"see {path}",
              flush=True)
    loader.check_bad_images()


def save(state: dict, path: Path) -> None:
    """save_on_master, with a full disk as a TrainingError."""
    try:
        save_on_master(state, path)
    except CheckpointError as error:
        raise TrainingError(f"{error}; make room, and the same command continues from it") from None


def is_out_of_shared_memory(error: RuntimeError | OSError) -> bool:
    """Whether the data workers found no room in /dev/shm, where their batches and semaphores lie."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOSPC and error.filename is None
    return any(words in str(error) for words in (
        "unable to allocate shared memory", "unable to write to file </torch_", "killed by signal: Bus error"))


def train_dino(args: argparse.Namespace, loss_class: type[DINOLoss] | None = None) -> None:
    """The whole job.

    Args:
        args: what get_args_parser gives.
        loss_class: a subclass of DINOLoss to train with, in place of --fused_loss.

    Raises:
        ConfigError: options, data or machine do not fit together.
        TrainingError: an image cannot be read, a loss was not finite, or disk or shared memory is full.
    """
    try:
        pretrain(args, loss_class)
    except UnreadableImage as error:
        raise TrainingError(str(error)) from None
    except (RuntimeError, OSError) as error:
        if isinstance(error, TrainingError) or not is_out_of_shared_memory(error):
            raise
        raise TrainingError("the data workers have run out of shared memory (/dev/shm): lower --num_workers (0 needs "
                            "none), or give a container more than Docker's 64 MB: docker run --shm-size=8g") from None
    finally:
        if is_distributed():
            torch.distributed.destroy_process_group()


def start_line(args: argparse.Namespace, processes: Processes, loader: CropLoader, run: TrainingRun,
               compiled: bool) -> str:
    small_batches = f" × {args.accum_steps}" if args.accum_steps > 1 else ""
    size = sum(p.numel() for p in run.student_module.backbone.parameters()) / 1e6
    return (f"{args.arch}/{args.patch_size} ({size:.1f} M parameters), {len(loader.dataset)} images in "
            f"{len(loader.dataset.classes)} folders, {processes.world_size} × {args.batch_size_per_gpu}"
            f"{small_batches} images per step on {processes.device.type} in {str(run.dtype).removeprefix('torch.')}"
            f"{', compiled (the first steps take minutes)' if compiled else ''}; "
            + (f"resuming after epoch {run.epoch - 1}" if run.epoch else "starting from scratch")
            + (f"\n{loader.dataset.unread_summary()}" if loader.dataset.unread_summary() else ""))


def plain_args(args: argparse.Namespace, world_size: int) -> dict:
    """The options as plain values, which torch.load(weights_only=True) reads."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return plain | {"world_size": world_size}


def main(loss_class: type[DINOLoss] | None = None) -> None:
    """The command line, for a script with a loss of its own too: run_main(main, MyLoss)."""
    parser = ArgumentParser(description=__doc__.split("\n\n")[0], parents=[get_args_parser()],
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    train_dino(parser.parse_args(), loss_class)


if __name__ == "__main__":
    run_main(main)
