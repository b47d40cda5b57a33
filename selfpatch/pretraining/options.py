"""The options of pretraining: the published names and defaults, with advice and bounds, and their checks."""
import argparse
import os
import tempfile
from pathlib import Path

from selfpatch.checkpoints.published import FORMS, is_remote, resolve_path
from selfpatch.data.sources import KINDS, add_source_options, check_paths
from selfpatch.errors import (
    POSITIVE_FLOAT,
    ArgumentParser,
    ConfigError,
    Number,
    OneOrSeveral,
    check_may_start,
    describe,
)
from selfpatch.method.vision_transformer import ARCHS, RECOMPUTED
from selfpatch.pretraining.auto_options import COMPILE_WAYS
from selfpatch.pretraining.logs import check_log
from selfpatch.pretraining.resuming import FIXED
from selfpatch.pretraining.run_folder import RunFolder
from selfpatch.pretraining.trackers import TRACKERS, check_trackers, chosen_trackers


def bool_flag(text: str) -> bool:
    """Type of a boolean option: true, 1 or on; false, 0 or off."""
    if text.lower() in ("true", "1", "on"):
        return True
    if text.lower() in ("false", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true/1/on nor false/0/off")


# bounds far above what anyone uses, far below what overflows a 64-bit integer or the memory of a list
COUNT, SMALL_COUNT = Number(int, 1, 10**6), Number(int, 1, 10**4)
PROTOTYPES, INTERVAL = Number(int, 1, 10**8), Number(int, 0, 10**9)
SHARE, NOT_NEGATIVE = Number(float, 0, 1), Number(float, 0)


def get_args_parser() -> ArgumentParser:
    """The options of main_selfpatch.py, as a parent for a job's own parser."""
    parser = ArgumentParser("main_selfpatch", add_help=False)
    for add_options in (add_model_options, add_loss_options, add_optimisation_options, add_crop_options,
                        add_run_options, add_probe_options, add_process_options):
        add_options(parser)
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--arch", default="deit_tiny", choices=list(ARCHS),
                       help="backbone; deit_* are other names for vit_*. The paper's results are vit_small's; "
                            "vit_pico is for trying, with --patch_size 8 and small crops")
    group.add_argument("--patch_size", default=16, type=SMALL_COUNT,
                       help="side of a patch in pixels; 8 gives finer features for about 5 times the time and memory")
    group.add_argument("--out_dim", default=65536, type=PROTOTYPES,
                       help="prototypes of the image head; many do well on large data, use fewer on small data")
    group.add_argument("--out_dim_selfpatch", default=4096, type=PROTOTYPES, help="prototypes of the patch head")
    group.add_argument("--head_hidden_dim", default=2048, type=COUNT,
                       help="width of the hidden layers of both projection heads; with vit_pico 256 is enough, and "
                            "several times as fast")
    group.add_argument("--k_num", default=4, type=Number(int, 1, 8), help="positives of a patch among its 8 neighbours")
    group.add_argument("--norm_last_layer", default=True, type=bool_flag,
                       help="keep the student's prototypes at unit length; false can do better with vit_small, but is "
                            "less stable; keep it true for vit_base")
    group.add_argument("--use_bn_in_head", default=False, type=bool_flag, help="BatchNorm in both projection heads")
    group.add_argument("--drop_path_rate", default=0.1, type=Number(float, 0, below=1),
                       help="stochastic depth of the student's last block")
    group.add_argument("--init_weights", default="", type=os.path.expanduser, metavar="FILE",
                       help=f"start from {FORMS}: both backbones, and the heads of a SelfPatch run where they fit. "
                            "Lower --lr, --epochs and --warmup_epochs then; see docs/POST_TRAINING.md. A run that is "
                            "resumed does not use it")


def add_loss_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("loss and teacher")
    group.add_argument("--patch_loss_weight", default=0.1, type=NOT_NEGATIVE,
                       help="weight of the patch loss; 0 is DINO on this backbone, at DINO's cost")
    group.add_argument("--fused_loss", default="auto", choices=["auto", "on", "off"],
                       help="compute the losses without keeping logits, the same numbers in less memory; off: the "
                            "plain form in method/losses.py, which is the one to change. auto is on")
    group.add_argument("--momentum_teacher", default=0.996, type=SHARE,
                       help="the teacher's momentum at the start, rising to 1; use more (0.9995) with small batches")
    group.add_argument("--warmup_teacher_temp", default=0.04, type=POSITIVE_FLOAT,
                       help="the teacher's temperature at the start; lower it if the loss does not fall")
    group.add_argument("--teacher_temp", default=0.04, type=POSITIVE_FLOAT,
                       help="the teacher's temperature after its warm-up; above 0.07 is often unstable")
    group.add_argument("--warmup_teacher_temp_epochs", default=0, type=INTERVAL,
                       help="epochs from the first temperature to the second")


def add_optimisation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", default=300, type=COUNT, help="length of the run, and of its schedules")
    group.add_argument("--batch_size_per_gpu", default=64, type=COUNT,
                       help="images per process; the learning rate scales with the sum over all processes")
    group.add_argument("--accum_steps", default=1, type=COUNT,
                       help="batches of --batch_size_per_gpu per step: 8 on one GPU is the recipe of 8 GPUs (except "
                            "for BatchNorm in the heads, which sees one small batch)")
    group.add_argument("--optimizer", default="adamw", choices=["adamw", "sgd", "lars"],
                       help="adamw for ViTs; lars for very large batches")
    group.add_argument("--lr", default=0.0005, type=NOT_NEGATIVE, help="peak learning rate for 256 images per step")
    group.add_argument("--min_lr", default=1e-6, type=NOT_NEGATIVE, help="learning rate at the end")
    group.add_argument("--warmup_epochs", default=10, type=INTERVAL,
                       help="epochs of linear warm-up of the learning rate")
    group.add_argument("--weight_decay", default=0.04, type=NOT_NEGATIVE, help="weight decay at the start")
    group.add_argument("--weight_decay_end", default=0.4, type=NOT_NEGATIVE,
                       help="weight decay at the end; ViTs do better if it rises")
    group.add_argument("--clip_grad", default=3.0, type=NOT_NEGATIVE,
                       help="largest norm of each tensor's gradient, 0 for none; 0.3 can help if training diverges")
    group.add_argument("--freeze_last_layer", default=1, type=Number(int, most=10**9),
                       help="epochs in which the heads' last layers stay frozen; try more if the loss does not fall")
    group.add_argument("--freeze_backbone_epochs", default=0, type=INTERVAL,
                       help="epochs in which the student's backbone stays frozen, so that fresh heads do not spoil it")
    group.add_argument("--layer_decay", default=1.0, type=Number(float, above=0, most=1),
                       help="learning rate of a block relative to that of the block after it; 1: all blocks learn "
                            "alike. 0.65 to 0.9 keep what early blocks have learnt, with --init_weights")
    group.add_argument("--use_fp16", default=True, type=bool_flag,
                       help="mixed precision on GPUs: bfloat16 where the GPU has it (compute capability 8.0 or more), "
                            "else float16. Turn it off if the loss becomes NaN; other devices use float32 either way")
    group.add_argument("--precision", default="auto", choices=["auto", "fp32", "tf32", "bf16", "fp16"],
                       help="one precision on any device; auto follows --use_fp16. bf16 is never emulated; tf32 is "
                            "fp32 whose products may use TF32 on a GPU")
    group.add_argument("--reduce_dtype", default="fp32", choices=["fp32", "bf16"],
                       help="in which gradients are summed over processes; bf16 halves what is sent, and rounds it")
    group.add_argument("--compile", default="auto", choices=COMPILE_WAYS,
                       help="compile the networks and the loss; auto: on CUDA. The first steps then take minutes. "
                            "torch.compile's modes, on CUDA: reduce-overhead adds CUDA graphs, for small batches; "
                            "max-autotune-no-cudagraphs tries matrix products with GELU in them, and compiles longer; "
                            "max-autotune both")
    group.add_argument("--pack_crops", default="auto", choices=["auto", "on", "off"],
                       help="one pass of the networks over the crops of all sizes, with half as many launches, instead "
                            "of one for each size; auto: on CUDA")
    group.add_argument("--checkpoint_activations", default="", nargs="?", const="block", choices=RECOMPUTED,
                       help="recompute in the backward pass, instead of keeping, what the student's backbone computes "
                            "within its blocks: all of it, or in attention or mlp only. Less memory for a part of "
                            "another forward pass")


def add_crop_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("crops")
    group.add_argument("--global_crops_scale", default=(0.25, 1.0), type=float, nargs=2, metavar=("LEAST", "MOST"),
                       help="share of the image that a global crop covers")
    group.add_argument("--global_crops_size", default=224, type=SMALL_COUNT, help="side, a multiple of the patch size")
    group.add_argument("--local_crops_number", default=8, type=Number(int, 0, 1000),
                       help="small crops per image, besides 2 global ones")
    group.add_argument("--local_crops_scale", default=(0.05, 0.25), type=float, nargs=2, metavar=("LEAST", "MOST"),
                       help="share of the image that a local crop covers")
    group.add_argument("--local_crops_size", default=96, type=Number(int, most=10**4),
                       help="side, a multiple of the patch size")
    group.add_argument("--augment", default="auto", choices=["auto", "pil", "device"],
                       help="where crops are flipped, coloured and blurred: pil, in the workers; device, in batches on "
                            "the device, which lets a worker load some ten times as many images. auto: device, on MPS "
                            "pil")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--data_path", default="/path/to/imagenet/train", type=os.path.expanduser, nargs="+",
                       action=OneOrSeveral, help="the images: " + KINDS + "; see docs/DATA.md")
    add_source_options(group)
    group.add_argument("--output_dir", default=".", type=os.path.expanduser,
                       help="where checkpoints and log.txt are written, and where a run is resumed from")
    group.add_argument("--saveckp_freq", default=10, type=INTERVAL,
                       help="keep a numbered checkpoint every N epochs, 0: none")
    group.add_argument("--save_every_minutes", default=15, type=Number(float, 0, 10**6),
                       help="save within an epoch after so many minutes, 0: at the ends of epochs alone. A resumed run "
                            "continues at the next sample")
    group.add_argument("--save_every_steps", default=0, type=Number(int, 0, 10**12),
                       help="save after every N-th step of the run as well")
    group.add_argument("--allow_changed", default=[], nargs="+", metavar="NAME", choices=FIXED,
                       help="resume although these are not what they were: " + ", ".join(FIXED))
    group.add_argument("--log_every", default=10, type=Number(int, 1, 10**9),
                       help="steps between two lines of progress, each with a row in output_dir/steps.jsonl")
    group.add_argument("--log_with", default=[], nargs="+", choices=TRACKERS,
                       help="send the rows of log.txt and steps.jsonl there as well: tensorboard (to "
                            "output_dir/tensorboard), wandb or trackio, which take their settings from the environment")
    group.add_argument("--tensorboard", action="store_true", help="short for --log_with tensorboard")
    group.add_argument("--peak_tflops", default=0, type=NOT_NEGATIVE,
                       help="what one device can do in the run's precision, 10^12 operations a second, as its data "
                            "sheet or benchmarks/train_step.py says: steps.jsonl then has the share that is used "
                            "(MFU). 0: the data sheet's, for GPUs that pretraining/flops.py knows")
    group.add_argument("--seed", default=0, type=Number(int, 0, 2**63 - 1),
                       help="of weights, order of images and crops")
    group.add_argument("--max_bad_images", default=0.001, type=SHARE,
                       help="largest share of the images that may be unreadable; each is replaced by the next one, and "
                            "listed in output_dir/bad_images.txt")
    group.add_argument("--loader_timeout", default=600, type=POSITIVE_FLOAT,
                       help="seconds that the data workers may take to start, or for a batch; then the run ends, "
                            "and for a batch the error names the file")
    group.add_argument("--num_workers", default=10, type=Number(int, 0, 1000), help="processes that load data, per GPU")


def add_probe_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation while training")
    group.add_argument("--knn_data", default="", type=os.path.expanduser, nargs="+", action=OneOrSeveral,
                       help="classify images by the teacher's features (k-NN, k = 20), for the log: any form of "
                            "--data_path that has classes, with train/ and val/ in it, or without them, where every "
                            "fifth image is classified by the others; hf:NAME has train and validation")
    group.add_argument("--knn_val_labels", default="", type=os.path.expanduser, metavar="FILE",
                       help="the classes of a flat val/ in --knn_data, as --val_labels of eval_knn.py")
    group.add_argument("--knn_every", default=10, type=Number(int, 1), help="epochs between two such evaluations")


def add_process_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("processes")
    group.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu", "mps"],
                       help="auto: the GPU if there is one. mps is untested")
    group.add_argument("--dist_url", default="env://", help="how the processes find each other")
    group.add_argument("--dist_timeout", default=30, type=Number(float, above=0, most=100_000),
                       help="minutes to wait for the other processes, at the start and in every exchange")
    group.add_argument("--port", default=29500, type=Number(int, most=65535),
                       help="of rank 0, where the launcher has set no MASTER_PORT")
    group.add_argument("--local_rank", "--local-rank", default=0, type=int, help="set by torch.distributed.launch")


def check_options(options: dict) -> None:
    """Find what cannot work before any time is spent on it.

    Raises:
        ConfigError: the first such option, and what to give.
    """
    check_numbers(options)
    check_may_start(options["num_workers"])
    check_paths(options["data_path"], suffixes=options["image_suffix"], column=options["image_column"])
    if options["knn_data"]:
        check_paths(options["knn_data"], "--knn_data")
    require(options["knn_data"] or not options["knn_val_labels"],
            f"--knn_val_labels {options['knn_val_labels']}: goes with --knn_data")
    output = Path(options["output_dir"])
    check_output_dir(output)
    check_trackers(chosen_trackers(options["log_with"], options["tensorboard"]), output)
    weights = options["init_weights"]
    # a run that continues does not use the file, which may be gone by then
    require(not weights or RunFolder(output).has_run() or is_remote(weights) or resolve_path(weights).exists(),
            f"there is no file {weights}: give --init_weights {FORMS}")


def check_numbers(options: dict) -> None:
    """The part of check_options that looks at no file; the bounds, too, since options may be made by hand."""
    get_args_parser().check(options)
    for name in ("warmup_epochs", "warmup_teacher_temp_epochs"):
        require(options[name] <= options["epochs"], f"--{name} is {options[name]}, longer than the run of --epochs "
                                                    f"{options['epochs']}: shorten it")
    for name in ("global_crops", "local_crops") if options["local_crops_number"] else ("global_crops",):
        check_crops(name, options[f"{name}_size"], options[f"{name}_scale"], options["patch_size"],
                    needs_neighbours=options["patch_loss_weight"] > 0)


def check_crops(name: str, size: int, scale: tuple[float, float], patch_size: int, needs_neighbours: bool) -> None:
    """Check size and scale of global_crops or local_crops."""
    least, most = scale
    require(size > 0 and size % patch_size == 0,
            f"--{name}_size is {size}, not a multiple of --patch_size {patch_size}: "
            f"try {max(round(size / patch_size), 3) * patch_size}")
    require(not needs_neighbours or size >= 3 * patch_size,
            f"--{name}_size is {size}, under 3 patches a side, so that the 8 neighbours of a patch "
            f"are not distinct: give {3 * patch_size} or more")
    require(0 < least <= most <= 1,
            f"--{name}_scale is {least} {most}: give two shares in ascending order, above 0, at most 1")


def small_grid_warning(sizes: dict[str, int], patch_size: int) -> str:
    """What the patch loss means where a crop has fewer than 5×5 patches, and what to give; empty where none has.

    Args:
        sizes: side of each kind of crop in pixels, by the name of its option.
        patch_size: side of a patch in pixels.
    """
    small = {name: size // patch_size for name, size in sizes.items() if size // patch_size < 5}
    if not small:
        return ""
    grids = " and ".join(f"--{name} {sizes[name]} gives {side}×{side}" for name, side in small.items())
    share = 8 / (min(small.values()) ** 2 - 1)
    return (f"warning: {grids} patches, where a patch's 8 neighbours (the grid wraps around) are {share:.0%} of the "
            "other patches: the patch loss then compares whole crops rather than parts. For 5×5 patches give "
            f"{' and '.join(f'--{name} {5 * patch_size}' for name in small)}, or a smaller --patch_size")


def check_output_dir(output: Path) -> None:
    """Check that the folder can be written to, and that the files of an earlier run are files, and log.txt text."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot write to --output_dir {output} ({reason}): choose another folder") from None
    checkpoint, log = "a checkpoint to resume from", "the log of a run"
    for name, content in (("checkpoint.pth", checkpoint), ("previous.pth", checkpoint), ("log.txt", log),
                          ("steps.jsonl", log)):
        path = output / name
        require(path.is_file() or not os.path.lexists(path),
                f"{path} is {describe(path)}, not {content}: remove it, or choose another --output_dir")
    check_log(output)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
