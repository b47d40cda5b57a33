"""The paper's claim at a small scale: one recipe without the patch loss (DINO), with it (SelfPatch), and no training.

    python benchmarks/evidence.py --seeds 0 1 2 --patch_loss_weight 0.03 0.1   # the demo's scenes and network, on a CPU
    python benchmarks/evidence.py --data_path imagenette --davis_path DAVIS --minutes 9     # ViT-S/16, on a GPU

Prints k-NN, J & F, dense retrieval, losses, images and seconds of every seed, and the differences between the methods;
curves.png, overlay.gif and figures.json go to --output_dir. Options that it does not know are main_selfpatch.py's. The
same command again goes on where it was stopped: only the pictures are drawn anew. docs/EVIDENCE.md: what was found.
"""
import argparse
import json
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out

from demo_seeds import cpu_seconds
from evidence_settings import DINO, UNTRAINED, Jobs, Photographs, Scenes, Setting, read
from evidence_tables import Figures, all_tables, differences

from main_selfpatch import build_run
from selfpatch.checkpoints.files import write_checkpoint
from selfpatch.distributed.processes import Process
from selfpatch.errors import (
    POSITIVE_FLOAT,
    ArgumentParser,
    ConfigError,
    RunStopped,
    require_packages,
    run_main,
    user_path,
)
from selfpatch.evaluation.tables import write_json
from selfpatch.pretraining.options import check_numbers
from selfpatch.pretraining.options import get_args_parser as pretraining_parser
from selfpatch.pretraining.resuming import IRRELEVANT, fix_random_seeds, plain_args, with_batch
from selfpatch.visualization.curves import draw_panels, make_panels, read_run

CURVES = ("image loss", "patch loss", "k-NN top-1, %")

# ----------------------------------------------------------------------------------------------------------------------
# The work


def write_untrained(words: list[str], output: Path) -> None:
    """The checkpoint that training with these words begins with."""
    options = pretraining_parser().parse_args(words[1:])
    fix_random_seeds(options.seed)
    run = build_run(options, Process(), steps_per_epoch=1)
    output.mkdir(parents=True, exist_ok=True)
    write_checkpoint({"teacher": run.teacher.state_dict(), "epoch": 0, "args": plain_args(vars(options), 1)},
                     output / "checkpoint.pth")


def pretrain(jobs: Jobs, words: list[str], record: Path) -> None:
    """Run the job of these words, unless its record says that it is done, and add to the time in the record."""
    batch = with_batch(vars(pretraining_parser().parse_args(words[1:])) | {"world_size": 1})["batch"]
    spent = read(record) or {"done": False, "batch": batch, "seconds": 0.0, "CPU s": 0.0}
    if spent["done"]:
        return
    start, cpu_start = time.monotonic(), cpu_seconds()
    try:
        jobs(*words)
        spent["done"] = True
    finally:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(spent | {"seconds": spent["seconds"] + time.monotonic() - start,
                            "CPU s": spent["CPU s"] + cpu_seconds() - cpu_start}, record)


def work(setting: Setting, jobs: Jobs, seed: int, method: str) -> None:
    """Train and evaluate one network, as far as that is not done."""
    folder = setting.place(seed) / method
    words = [*setting.words(seed, folder / "run"), *setting.args.others, "--patch_loss_weight",
             str(setting.weights[method])]
    if method != UNTRAINED:
        pretrain(jobs, words, folder / "training.json")
    elif not (folder / "run" / "checkpoint.pth").is_file():
        write_untrained(words, folder / "run")
    for name, evaluate in setting.evaluations(seed, folder).items():
        if not (folder / f"{name}.json").is_file():
            jobs.check()
            evaluate(folder / f"{name}.json")


# ----------------------------------------------------------------------------------------------------------------------
# What is reported


def training_figures(folder: Path) -> Figures:
    """Losses of the last epoch, images and time of a run that is done."""
    record, (steps, epochs) = read(folder / "training.json"), read_run(folder / "run")
    found = {"image loss": epochs[-1]["train_clsloss"], "patch loss": epochs[-1]["train_patchloss"],
             "images": record["batch"] * steps[-1]["step"], "seconds": record["seconds"], "CPU s": record["CPU s"]}
    if not found["patch loss"]:  # DINO has none
        del found["patch loss"]
    return found


def collect(setting: Setting, seeds: list[int]) -> dict[int, dict[str, Figures]]:
    """The figures that there are, by seed and method."""
    found = {}
    for seed in seeds:
        for method in setting.weights:
            folder = setting.place(seed) / method
            figures = setting.figures(folder)
            if read(folder / "training.json").get("done"):
                figures |= training_figures(folder)
            if figures:
                found.setdefault(seed, {})[method] = figures
    return found


def draw_curves(setting: Setting, seeds: list[int], output: Path) -> None:
    """Losses and k-NN while training, of the runs that there are: a line for each, a colour for each method."""
    folders = [(method, setting.place(seed) / method / "run") for method in setting.weights for seed in seeds]
    folders = [(method, folder) for method, folder in folders if (folder / "log.txt").is_file()]
    panels = make_panels([read_run(folder) for _, folder in folders]) if folders else []
    panels = [panel._replace(lines=[line if line is not None and line[:, 1].any() else None for line in panel.lines])
              for panel in panels if panel.title in CURVES]  # DINO's patch loss is 0 throughout
    if panels:
        draw_panels(panels, [method for method, _ in folders]).savefig(output, dpi=150)
        print(f"wrote {output}")


def report(setting: Setting, args: argparse.Namespace) -> None:
    """Print the tables of what there is, write them as JSON, and draw the curves."""
    found = collect(setting, args.seeds)
    if not found:
        return
    print(f"\n{setting.epochs} epochs; figures of frozen features from 0 to 1, losses of the last epoch; the number "
          "after SelfPatch is the patch loss's weight; ± is the standard deviation between seeds")
    pairs = [(DINO, method) for method, weight in setting.weights.items() if weight]
    print(all_tables(found, pairs))
    write_json({"figures": found, "differences": {method: differences(found, (DINO, method)) for _, method in pairs}},
               args.output_dir / "figures.json")
    draw_curves(setting, args.seeds, args.output_dir / "curves.png")


# ----------------------------------------------------------------------------------------------------------------------
# The command


def get_parser() -> ArgumentParser:
    parser = ArgumentParser(description="DINO, SelfPatch and no training: one recipe, all evaluations, several seeds; "
                                        "other options are those of main_selfpatch.py",
                            allow_abbrev=False)  # --seed is main_selfpatch.py's, not short for --seeds
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights, images' order and scenes")
    parser.add_argument("--output_dir", type=user_path, default=Path("runs/evidence"), help="where everything goes")
    parser.add_argument("--epochs", type=int, help="default: 8 of the scenes, 100 of photographs")
    parser.add_argument("--patch_loss_weight", type=POSITIVE_FLOAT, nargs="+", default=[0.1],
                        help="SelfPatch's, a run for each; DINO's is 0")
    parser.add_argument("--minutes", type=float, default=0,
                        help="end after so many, saved: the same command again goes on; 0: no limit")
    parser.add_argument("--scenes", type=int, default=2000, help="to train on, without --data_path")
    parser.add_argument("--data_path", type=user_path, help="folder with train/ and val/ of class folders of "
                                                            "photographs, in place of the scenes")
    parser.add_argument("--davis_path", type=user_path, help="DAVIS, for J & F of the photographs' networks")
    parser.add_argument("--segmentation_path", help="eval_dense_retrieval.py's --data, for their mean IoU")
    parser.add_argument("--num_classes", type=int, help="of --segmentation_path folders:")
    return parser


def check_settings(path: Path, settings: dict) -> None:
    """Write the settings of a folder of figures, or find out whether they are still the same.

    An evaluation may be added later.

    Raises:
        ConfigError: one has changed, and what is there would be mixed with other figures.
    """
    settings, known = json.loads(json.dumps(settings)), read(path)
    changed = [f"{name} {settings[name]} (there {known[name]})" for name in known
               if name in settings and known[name] != settings[name]]
    if changed:
        raise ConfigError(f"{path.parent} has figures of other settings: {', '.join(changed)}; give its values, or "
                          "choose another --output_dir")
    if settings.keys() - known.keys():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(known | settings, path)


def check_options(args: argparse.Namespace) -> None:
    """Raise ConfigError for what cannot work."""
    for name, least in (("epochs", 1), ("scenes", 1), ("minutes", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ConfigError(f"--{name} {getattr(args, name)}: give {least} or more")
    if (args.davis_path or args.segmentation_path) and not args.data_path:
        raise ConfigError("--davis_path and --segmentation_path go with --data_path: the scenes have their own clips "
                          "and materials")
    folders = [args.davis_path, *([args.data_path / "train", args.data_path / "val"] if args.data_path else [])]
    for folder in filter(None, folders):
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no folder: --data_path has train and val in it, --davis_path ImageSets")
    require_packages("evidence.py", "matplotlib")


def main(args: argparse.Namespace, others: list[str]) -> None:
    """Raises ConfigError for options, TrainingError for a job that failed, RunStopped where time is up."""
    check_options(args)
    for option in {"--seed", "--init_weights"} & {word.partition("=")[0] for word in others}:
        raise ConfigError(f"{option} is not taken here: seeds are those of --seeds, and all weights begin at random")
    args.others, jobs = others, Jobs(args.minutes)
    setting = (Photographs if args.data_path else Scenes)(args, jobs)
    options = vars(pretraining_parser().parse_args([*setting.words(0, args.output_dir)[1:], *others]))
    check_numbers(options | {"patch_loss_weight": args.patch_loss_weight[0]})  # SelfPatch asks for more than DINO
    decisive = {name: value for name, value in with_batch(options | {"world_size": 1}).items()
                if name not in IRRELEVANT | {"seed", "patch_loss_weight"}}
    check_settings(args.output_dir / "settings.json", decisive | setting.description())
    signal.signal(signal.SIGTERM, stop)
    try:
        for seed in args.seeds:
            setting.prepare(seed)
            for method in setting.weights:
                work(setting, jobs, seed, method)
        setting.overlay(args.output_dir / "overlay.gif", args.seeds[0])
    finally:
        report(setting, args)


def stop(*_) -> None:
    """The handler of SIGTERM: the job under way is asked to end as well."""
    raise RunStopped("SIGTERM: start the same command again to go on", signal.SIGTERM)


if __name__ == "__main__":
    run_main(main, *get_parser().parse_known_args())
