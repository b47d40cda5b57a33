"""The options of pretraining: the published names and defaults, with advice, and what cannot work together."""
import argparse
import math
import os
import tempfile

from utils import ArgumentParser, bool_flag, fail
from vision_transformer import ARCHS


def get_args_parser() -> argparse.ArgumentParser:
    """The options of main_selfpatch.py, to be the parent of a job's own parser."""
    parser = ArgumentParser("main_selfpatch", add_help=False)
    for add_options in (add_model_options, add_loss_options, add_optimisation_options, add_crop_options,
                        add_run_options, add_process_options):
        add_options(parser)
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--arch", default="deit_tiny", choices=list(ARCHS),
                       help="backbone; deit_* are other names for vit_*. The paper's results are vit_small's")
    group.add_argument("--patch_size", default=16, type=int,
                       help="side of a patch in pixels; 8 gives finer features for about 5 times the time and memory")
    group.add_argument("--out_dim", default=65536, type=int,
                       help="prototypes of the image head; large ones do well on large data, take fewer on small data")
    group.add_argument("--out_dim_selfpatch", default=4096, type=int, help="prototypes of the patch head")
    group.add_argument("--k_num", default=4, type=int, help="positives of a patch among its 8 neighbours")
    group.add_argument("--norm_last_layer", default=True, type=bool_flag,
                       help="keep the student's prototypes at unit length; false can do better on vit_small, but is "
                            "less stable, and wants to be true for vit_base")
    group.add_argument("--use_bn_in_head", default=False, type=bool_flag, help="BatchNorm in both projection heads")
    group.add_argument("--drop_path_rate", default=0.1, type=float, help="stochastic depth of the student's last block")


def add_loss_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("loss and teacher")
    group.add_argument("--patch_loss_weight", default=0.1, type=float,
                       help="weight of the patch loss; 0 is DINO on this backbone, at DINO's cost")
    group.add_argument("--momentum_teacher", default=0.996, type=float,
                       help="the teacher's momentum at the start, rising to 1; small batches want more (0.9995)")
    group.add_argument("--warmup_teacher_temp", default=0.04, type=float,
                       help="the teacher's temperature at the start; lower it if the loss does not fall")
    group.add_argument("--teacher_temp", default=0.04, type=float,
                       help="the teacher's temperature after its warm-up; above 0.07 is often unstable")
    group.add_argument("--warmup_teacher_temp_epochs", default=0, type=int, help="epochs between the two")


def add_optimisation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", default=300, type=int, help="length of the run, and of its schedules")
    group.add_argument("--batch_size_per_gpu", default=64, type=int,
                       help="images a process; the learning rate follows the sum over all processes")
    group.add_argument("--accum_steps", default=1, type=int,
                       help="batches of --batch_size_per_gpu that make one step: 8 on one GPU is the recipe of 8 GPUs "
                            "(but for BatchNorm in the heads, which sees one small batch)")
    group.add_argument("--optimizer", default="adamw", choices=["adamw", "sgd", "lars"],
                       help="adamw for ViTs; lars for very large batches")
    group.add_argument("--lr", default=0.0005, type=float, help="peak learning rate for 256 images a step")
    group.add_argument("--min_lr", default=1e-6, type=float, help="learning rate at the end")
    group.add_argument("--warmup_epochs", default=10, type=int, help="epochs of linear warm-up of the learning rate")
    group.add_argument("--weight_decay", default=0.04, type=float, help="weight decay at the start")
    group.add_argument("--weight_decay_end", default=0.4, type=float,
                       help="weight decay at the end; a rising one does better for ViTs")
    group.add_argument("--clip_grad", default=3.0, type=float,
                       help="largest norm of each tensor's gradient, 0 for none; 0.3 can help if training diverges")
    group.add_argument("--freeze_last_layer", default=1, type=int,
                       help="epochs in which the heads' last layers stay; more if the loss does not fall")
    group.add_argument("--use_fp16", default=True, type=bool_flag,
                       help="mixed precision on GPUs: bfloat16 where the GPU has it, else float16. Turn it off if the "
                            "loss becomes NaN; on other devices it is float32 either way")
    group.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"],
                       help="ask for one precision on any device; auto is as --use_fp16 says")
    group.add_argument("--compile", default="auto", choices=["auto", "on", "off"],
                       help="compile the networks and the loss; auto: on CUDA. The first steps then take minutes")
    group.add_argument("--checkpoint_activations", action="store_true",
                       help="hold one tensor a block of the student's backbone and compute the rest anew: less memory "
                            "for one more forward pass")


def add_crop_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("crops")
    group.add_argument("--global_crops_scale", default=(0.25, 1.0), type=float, nargs=2, metavar=("LEAST", "MOST"),
                       help="share of the image that a global crop covers")
    group.add_argument("--global_crops_size", default=224, type=int, help="side, a multiple of the patch size")
    group.add_argument("--local_crops_number", default=8, type=int, help="small crops an image, besides 2 global ones")
    group.add_argument("--local_crops_scale", default=(0.05, 0.25), type=float, nargs=2, metavar=("LEAST", "MOST"),
                       help="share of the image that a local crop covers")
    group.add_argument("--local_crops_size", default=96, type=int, help="side, a multiple of the patch size")
    group.add_argument("--augment", default="auto", choices=["auto", "pil", "device"],
                       help="where flips, colours and blur are done: pil, in the workers; device, on whole batches on "
                            "the device, which lets a worker load some ten times as many images. auto: device, on MPS "
                            "pil")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--data_path", default="/path/to/imagenet/train", help="folder of class folders of images")
    group.add_argument("--output_dir", default=".", help="where checkpoints and log.txt go, and are taken up again")
    group.add_argument("--saveckp_freq", default=10, type=int, help="keep a checkpoint every so many epochs, 0: none")
    group.add_argument("--log_every", default=10, type=int, help="steps between two lines of progress")
    group.add_argument("--tensorboard", action="store_true", help="write curves to output_dir/tensorboard as well")
    group.add_argument("--seed", default=0, type=int, help="of weights, order of images and crops")
    group.add_argument("--num_workers", default=10, type=int, help="processes that load data, for each GPU")


def add_process_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("processes")
    group.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu", "mps"],
                       help="auto: the GPU where there is one. mps is untested")
    group.add_argument("--dist_url", default="env://", help="how the processes find each other")
    group.add_argument("--port", default=29500, type=int, help="of rank 0, where the launcher has set no MASTER_PORT")
    group.add_argument("--local_rank", "--local-rank", default=0, type=int, help="set by torch.distributed.launch")


def images_per_step(args: argparse.Namespace) -> int:
    """Images that one step of the optimiser sees, over all small batches and ranks."""
    return args.batch_size_per_gpu * args.accum_steps * args.world_size


def check_args(args: argparse.Namespace) -> None:
    """Find what cannot work before any time is spent on it; ends the job with one line and status 2."""
    def need(holds: bool, message: str) -> None:
        if not holds:
            fail(message)

    for name in ("epochs", "batch_size_per_gpu", "patch_size", "out_dim", "out_dim_selfpatch", "log_every",
                 "accum_steps"):
        need(getattr(args, name) > 0, f"--{name} is {getattr(args, name)}: it must be at least 1")
    for name in ("local_crops_number", "num_workers", "warmup_epochs", "warmup_teacher_temp_epochs", "clip_grad",
                 "patch_loss_weight", "saveckp_freq"):
        need(getattr(args, name) >= 0, f"--{name} is {getattr(args, name)}: it must not be negative")
    for name in ("lr", "min_lr", "weight_decay", "weight_decay_end", "seed"):
        need(0 <= getattr(args, name) < math.inf, f"--{name} is {getattr(args, name)}: it must be a number from 0 on")
    for name in ("warmup_teacher_temp", "teacher_temp"):
        need(0 < getattr(args, name) < math.inf, f"--{name} is {getattr(args, name)}: it must be above 0")
    need(0 <= args.drop_path_rate < 1, f"--drop_path_rate is {args.drop_path_rate}: it must be from 0 to below 1")
    need(0 <= args.momentum_teacher <= 1, f"--momentum_teacher is {args.momentum_teacher}: it must be from 0 to 1")
    need(1 <= args.k_num <= 8, f"--k_num is {args.k_num}, but a patch has 8 neighbours: choose 1 to 8")
    for name in ("warmup_epochs", "warmup_teacher_temp_epochs"):
        need(getattr(args, name) <= args.epochs,
             f"--{name} is {getattr(args, name)}, longer than the run of --epochs {args.epochs}: shorten it")
    for name in ("global_crops", "local_crops") if args.local_crops_number else ("global_crops",):
        size, (least, most) = getattr(args, f"{name}_size"), getattr(args, f"{name}_scale")
        need(size > 0 and size % args.patch_size == 0,
             f"--{name}_size is {size}, no multiple of --patch_size {args.patch_size}: "
             f"take {max(round(size / args.patch_size), 3) * args.patch_size}")
        need(not args.patch_loss_weight or size >= 3 * args.patch_size,
             f"--{name}_size is {size}, under 3 patches a side, so that the 8 neighbours of a patch "
             f"are not distinct: take {3 * args.patch_size} or more")
        need(0 < least <= most <= 1, f"--{name}_scale is {least} {most}: give two shares in order, above 0, at most 1")
    need(os.path.isdir(args.data_path),
         f"there is no folder {args.data_path}: give --data_path, a folder of class folders of images")
    try:
        os.makedirs(args.output_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output_dir).close()
    except OSError as error:
        fail(f"cannot write to --output_dir {args.output_dir} ({error.strerror}): choose another")
