"""Pretrain a Vision Transformer with SelfPatch: DINO plus a patch-level loss (Yun et al. 2022, arXiv 2206.07990).

    python main_selfpatch.py --arch vit_small --data_path imagenet/train --output_dir runs/one     # one GPU, or the CPU
    torchrun --nproc_per_node=8 main_selfpatch.py --arch vit_small --data_path imagenet/train --output_dir runs/eight
    srun --ntasks-per-node=8 --gpus-per-node=8 python main_selfpatch.py ...                        # Slurm

The same command again continues from output_dir/checkpoint.pth.
"""
import argparse
import errno
import sys
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from selfpatch.checkpoints.published import download_first
from selfpatch.data.augmentations import DataAugmentationDINO  # noqa: F401 (DINO's users import it from here)
from selfpatch.data.dataset import build_dataset
from selfpatch.data.files import UnreadableImage, decoder_note
from selfpatch.data.loader import CropLoader
from selfpatch.data.sources import open_images, prepare
from selfpatch.distributed.collectives import sync_batchnorms
from selfpatch.distributed.precision import allow_tf32, describe_precision
from selfpatch.distributed.processes import (
    Process,
    init_distributed_mode,
    is_distributed,
    is_lost_contact,
    is_main_process,
    keep_freed_memory,
    leave_processes,
    on_main_process,
    together,
)
from selfpatch.distributed.rank_watch import RankWatch
from selfpatch.distributed.stopping import Interruption
from selfpatch.errors import ArgumentParser, ConfigError, TrainingError, run_main, try_print
from selfpatch.evaluation.labelled_images import Places
from selfpatch.method.fused_loss import FusedDINOLoss
from selfpatch.method.losses import DINOLoss
from selfpatch.method.optim import build_optimizer
from selfpatch.method.selfpatch_head import MultiCropWrapper  # noqa: F401
from selfpatch.method.training_run import TrainingRun, build_networks, build_schedules
from selfpatch.pretraining.auto_options import (
    choose_augment,
    choose_compile,
    choose_loss,
    choose_packing,
    choose_precision,
    compile_mode,
    uses_cuda_graphs,
)
from selfpatch.pretraining.engine import NotFiniteError, train_one_epoch  # noqa: F401 (DINO's name)
from selfpatch.pretraining.flops import flops_per_image, peak_tflops
from selfpatch.pretraining.initial_weights import read_initial_weights, set_initial_weights
from selfpatch.pretraining.knn_probe import KnnProbe
from selfpatch.pretraining.logs import RunLog
from selfpatch.pretraining.loop import TrainingLoop, rare_collection
from selfpatch.pretraining.options import check_options, get_args_parser, small_grid_warning
from selfpatch.pretraining.resuming import compare_ranks, fix_random_seeds, plain_args, resume
from selfpatch.pretraining.run_folder import RunFolder
from selfpatch.pretraining.trackers import Trackers, chosen_trackers


def images_per_step(args: argparse.Namespace, world_size: int) -> int:
    """Images of one step of the optimiser, over all small batches and ranks."""
    return args.batch_size_per_gpu * args.accum_steps * world_size


def build_loader(args: argparse.Namespace, process: Process, compiled: bool) -> CropLoader:
    images = open_images(args.data_path, suffixes=args.image_suffix, column=args.image_column)
    dataset = build_dataset(images, args.global_crops_scale, args.local_crops_scale, args.local_crops_number,
                            args.global_crops_size, args.local_crops_size,
                            choose_augment(args.augment, process.device))
    if len(dataset) < images_per_step(args, process.world_size):
        raise ConfigError(
            f"--data_path {dataset.images.source} has {len(dataset)} images, fewer than the "
            f"{images_per_step(args, process.world_size)} of one step ({args.batch_size_per_gpu} × "
            f"{args.accum_steps} small batches × {process.world_size} processes): lower --batch_size_per_gpu or "
            "--accum_steps")
    loader = CropLoader(dataset, args.batch_size_per_gpu, args.num_workers, process, args.seed, args.max_bad_images,
                        args.loader_timeout)
    if compiled:
        loader.compile()
    return loader


def share_gradients(student: nn.Module, device: torch.device, reduce_dtype: str = "fp32") -> DistributedDataParallel:
    """The student with gradients that are averaged over all processes, sent as reduce_dtype (fp32 or bf16) says."""
    student = DistributedDataParallel(student, device_ids=[device] if device.type == "cuda" else None,
                                      gradient_as_bucket_view=True)
    if reduce_dtype == "bf16":
        student.register_comm_hook(None, bf16_compress_hook)
    return student


def build_run(args: argparse.Namespace, process: Process, steps_per_epoch: int, dtype: torch.dtype = torch.float32,
              compiled: bool = False, loss_class: type[DINOLoss] = FusedDINOLoss) -> TrainingRun:
    """Networks, loss, optimiser and schedules of the options, at step 0, on the device."""
    device, distributed = process.device, process.world_size > 1
    networks = build_networks(args.arch, args.patch_size, args.out_dim, args.out_dim_selfpatch, args.drop_path_rate,
                              args.norm_last_layer, k_num=args.k_num, use_patches=args.patch_loss_weight > 0,
                              pack_crops=choose_packing(args.pack_crops, device), use_bn=args.use_bn_in_head,
                              hidden_dim=args.head_hidden_dim)
    if distributed and args.use_bn_in_head:
        networks = [sync_batchnorms(network, device) for network in networks]
    student, teacher = (network.to(device) for network in networks)
    recomputed = args.checkpoint_activations  # True and False in Namespaces made before it took names
    student.backbone.checkpoint_activations = "block" if recomputed is True else recomputed or ""
    dino_loss = loss_class(args.out_dim, args.out_dim_selfpatch, 2 + args.local_crops_number,
                           args.warmup_teacher_temp, args.teacher_temp, args.warmup_teacher_temp_epochs, args.epochs,
                           patch_loss_weight=args.patch_loss_weight).to(device)
    optimizer = build_optimizer(student, args.optimizer, args.layer_decay)
    if compiled:
        if args.checkpoint_activations:
            torch._dynamo.config.optimize_ddp = False  # older torch cannot split a graph that has checkpoints in it
        # plain losses stay as they are: they would be compiled anew at every epoch
        for part in (student, teacher, *[dino_loss] * isinstance(dino_loss, FusedDINOLoss)):
            part.compile(dynamic=False, mode=compile_mode(args.compile))  # the two resolutions never change
    if distributed:
        student = share_gradients(student, device, args.reduce_dtype)
    schedules = build_schedules(args.epochs, steps_per_epoch,
                                args.lr * images_per_step(args, process.world_size) / 256, args.min_lr,
                                args.warmup_epochs, (args.weight_decay, args.weight_decay_end), args.momentum_teacher)
    return TrainingRun(student, teacher, dino_loss, optimizer, schedules, dtype, args.clip_grad,
                       args.freeze_last_layer, args.accum_steps, args.freeze_backbone_epochs,
                       compiled and uses_cuda_graphs(args.compile))


def pretrain(args: argparse.Namespace, loss_class: type[DINOLoss] | None = None) -> None:
    """Set up, resume, train, save."""
    check_options(vars(args))
    loss_class, timeout = choose_loss(args.fused_loss, loss_class), timedelta(minutes=args.dist_timeout)
    process = init_distributed_mode(args.device, args.local_rank, args.port, args.dist_url, timeout)
    compiled = choose_compile(args.compile, process.device)
    dtype = together(lambda: choose_precision(args.precision, args.use_fp16, process.device))
    allow_tf32(args.precision == "tf32")
    folder = RunFolder(args.output_dir, args.saveckp_freq)
    continues = on_main_process(folder.has_run)
    # before the images are listed, which can take minutes
    download_first([] if continues else [args.init_weights])
    weights = together(lambda: read_initial_weights(args.init_weights, args.arch, args.patch_size)
                       if args.init_weights and not continues else None)
    on_main_process(lambda: prepare(args.data_path))
    loader = together(lambda: build_loader(args, process, compiled))
    places = Places(args.knn_data, val_labels=args.knn_val_labels, suffixes=args.image_suffix, column=args.image_column)
    probe = together(lambda: KnnProbe(places, args.global_crops_size, args.batch_size_per_gpu, args.num_workers,
                                      process.device, dtype, args.knn_every) if args.knn_data else None)
    saved_args = plain_args(vars(args), process.world_size, loader.dataset)
    together(lambda: compare_ranks(saved_args))
    fix_random_seeds(args.seed)
    torch.backends.cudnn.benchmark = True
    if process.device.type == "cpu":
        keep_freed_memory()
    run = build_run(args, process, len(loader) // args.accum_steps, dtype, compiled, loss_class)
    on_main_process(folder.lock)
    log = None
    try:
        older_log, within = begin(run, folder, weights, saved_args)
        weights = None  # free memory for the optimiser's state
        if is_main_process():
            try_print(start_line(args, process, loader, run, compiled))
        log = together(lambda: open_log(args, folder, run, loader, saved_args, older_log) if is_main_process()
                       else None)
        with rare_collection(), Interruption(args.save_every_minutes, timeout) as interruption, \
                RankWatch(process.rank, process.world_size, timeout, args.dist_url):
            loop = TrainingLoop(run, loader, folder, log, saved_args, interruption, args.save_every_steps)
            loop.train(within, args.seed, process, args.log_every, probe)
    except NotFiniteError as error:
        raise TrainingError(f"{error}{folder.keep_for_inspection(run.state_dict())}") from None
    finally:
        if log:
            log.trackers.close()
        loader.close()
        folder.unlock()


def begin(run: TrainingRun, folder: RunFolder, weights: tuple | None,
          saved_args: dict) -> tuple[list[int] | None, dict]:
    """Continue from the folder's checkpoint, or begin with the weights of --init_weights; returns what resume does."""
    path = on_main_process(folder.find)
    older_log, within = together(lambda: resume(run, folder, path, saved_args))
    if weights and path is None:
        line = together(lambda: set_initial_weights(run.student_module, run.teacher, *weights))
        if is_main_process():
            try_print(line)
    if path == folder.last and not within:
        on_main_process(lambda: folder.copy_if_missing(run.epoch - 1))
    return older_log, within


def open_log(args: argparse.Namespace, folder: RunFolder, run: TrainingRun, loader: CropLoader, saved_args: dict,
             older_log: list[int] | None) -> RunLog:
    """log.txt, steps.jsonl and the trackers of --log_with."""
    sizes = [args.global_crops_size] * 2 + [args.local_crops_size] * args.local_crops_number
    half, world_size = run.dtype != torch.float32, saved_args["world_size"]
    peak = (args.peak_tflops or half * peak_tflops(run.device)) * 1e12 * world_size
    log = RunLog(folder.path, run, loader, images_per_step(args, world_size), older_log,
                 flops_per_image(run.student_module, sizes) / peak if peak else None)
    # last, since nothing would close them if the log raised
    log.trackers = Trackers(chosen_trackers(args.log_with, args.tensorboard), folder.path, saved_args, run.epoch,
                            run.step)
    return log


def is_out_of_shared_memory(error: RuntimeError | OSError) -> bool:
    """Whether the data workers found no room in /dev/shm, which holds their batches and semaphores."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOSPC and error.filename is None
    return any(words in str(error) for words in (
        "unable to allocate shared memory", "unable to write to file </torch_", "killed by signal: Bus error"))


def train_dino(args: argparse.Namespace, loss_class: type[DINOLoss] | None = None) -> None:
    """Run the whole job.

    Args:
        args: from get_args_parser; a Namespace made by hand is checked, too.
        loss_class: a subclass of DINOLoss to train with, instead of --fused_loss.

    Raises:
        ConfigError: options, data or machine do not fit together.
        TrainingError: an image cannot be read, a loss is not finite, the disk or shared memory is full, or another
            process is gone.
        RunStopped: a signal asked the run to end, and it has saved.
    """
    try:
        pretrain(args, loss_class)
    except UnreadableImage as error:
        raise TrainingError(str(error)) from None
    except (RuntimeError, OSError) as error:
        if isinstance(error, TrainingError):
            raise
        if is_distributed() and is_lost_contact(error):
            raise TrainingError(f"lost contact with another process, which has ended, hangs or cannot be reached "
                                f"({str(error).splitlines()[0]}): see its own message; the same command continues "
                                "from the last checkpoint") from None
        if not is_out_of_shared_memory(error):
            raise
        raise TrainingError("the data workers have run out of shared memory (/dev/shm): lower --num_workers (0 needs "
                            "none), or give a container more than Docker's 64 MB: docker run --shm-size=8g") from None
    finally:
        leave_processes()


def start_line(args: argparse.Namespace, process: Process, loader: CropLoader, run: TrainingRun,
               compiled: bool) -> str:
    small_batches = f" × {args.accum_steps}" if args.accum_steps > 1 else ""
    backbone = run.student_module.backbone
    size = sum(p.numel() for p in backbone.parameters()) / 1e6
    images, classes = loader.dataset.images, len(loader.dataset.classes)
    sizes = {"global_crops_size": args.global_crops_size} | (
        {"local_crops_size": args.local_crops_size} if args.local_crops_number else {})
    grid_note = small_grid_warning(sizes, args.patch_size) if args.patch_loss_weight else ""
    return (f"{args.arch}/{args.patch_size} ({size:.1f} M parameters), {len(images)} images"
            f"{f' in {classes} folders' if classes else ''}, {process.world_size} × {args.batch_size_per_gpu}"
            f"{small_batches} images per step on {process.device.type} in "
            f"{describe_precision(process.device, run.dtype, backbone.embed_dim // backbone.num_heads)}"
            f"{', compiled (the first steps take minutes)' if compiled else ''}; "
            + (f"resuming in epoch {run.epoch} after step {run.step % run.steps_per_epoch}"
               if run.step % run.steps_per_epoch else
               f"resuming after epoch {run.epoch - 1}" if run.epoch else
               f"starting from {args.init_weights or 'scratch'}")
            + "".join(f"\n{note}" for note in (*images.notes(), decoder_note(), grid_note) if note))


def main(loss_class: type[DINOLoss] | None = None) -> None:
    """The command line; for a script with its own loss, too: run_main(main, MyLoss)."""
    parser = ArgumentParser(description=__doc__, parents=[get_args_parser()],
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    train_dino(parser.parse_args(), loss_class)


if __name__ == "__main__":
    run_main(main)
