"""Print docs/CHECKPOINTS.md from the tables that the loader uses.

    python -m docs.checkpoints_page > docs/CHECKPOINTS.md
"""
from selfpatch.checkpoints.foreign_files import FOREIGN_FORMATS
from selfpatch.checkpoints.layouts import IGNORED, NETWORKS, PATCH_EMBEDDINGS, SMALL_HEADS, UNSUPPORTED, VISSL_STEPS
from selfpatch.checkpoints.published import PUBLISHED


def table(header: tuple, rows: list[tuple]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows)]


def heads_and_files() -> list[str]:
    """Return the last two sections of the page."""
    heads = ", ".join(f"{kind} (ViT-S: {number})" for kind, number in SMALL_HEADS.items())
    return [
        "## How many attention heads it gets", "",
        "Tensors do not tell the number. It is the architecture's (3, 6, 12) unless the file records another one, as "
        "`num_heads` in `meta` or in the header of a .safetensors file, or in the config.json beside "
        f"{' or '.join(PUBLISHED)}, or is of a kind with another one: "
        f"{heads}. The line says where the number comes from, and `(assumed)` for a ViT-S that does not tell. "
        "`convert_checkpoint.py --num_heads` records the right one.", "",
        "## What kind of file it is", "",
        "What torch.save or safetensors writes. Other formats are named, with what to do about them: "
        f"{', '.join(what for _, _, what, _ in FOREIGN_FORMATS)}, a zip archive, a .npz file, a TorchScript program, "
        "an ONNX model.", "",
        "Beside the tensors, a file may have options and states of any class. Numbers, text, containers, dates, "
        "argparse's Namespace and NumPy's arrays and scalars are read as they are, paths as text, and everything else "
        "as an inert stand-in that keeps what the file says about it. Nothing of the file is called: names of modules "
        "that can run code, such as os or subprocess, are refused."]


def places() -> list[str]:
    """Return the section on files, folders, addresses and the Hub."""
    return [
        "## Where the weights are", "",
        "Every option for weights, and `load_backbone`, takes:", "",
        *table(("path", "what is read"), [
            ("a file", "`.pth`, `.safetensors` or any other name; the content tells"),
            ("a folder", f"`checkpoint.pth` of a run, or `{'` or `'.join(PUBLISHED)}` as timm, Hugging Face and "
                         "`convert_checkpoint.py --to timm` write it"),
            ("`https://…`", "downloaded once, to a folder for each address in torch.hub's cache (`TORCH_HOME`), "
                            "`hub/checkpoints/selfpatch`"),
            ("`hf-hub:NAME`, `hf-hub:NAME@REVISION`", "such a folder of the Hugging Face Hub, through its own cache; "
                                                      "without network access under `HF_HUB_OFFLINE=1`")]), "",
        "Of several processes one downloads while the others wait. What an address gives is kept if it can be read "
        "and, where its name ends like `vit-0123abcd.pth` (eight or more hexadecimal digits, not a date), its SHA-256 "
        "begins so. To download it again, remove the file that the job names.", ""]


def page() -> str:
    """Return docs/CHECKPOINTS.md as Markdown."""
    pairs = [(f"`{teacher}`", f"`{student}`", writer) for teacher, student, _, writer in NETWORKS]
    lines = [
        "# Which checkpoints load, and what each becomes", "",
        "Printed by `python -m docs.checkpoints_page` from the tables that the loader uses.", "",
        "Every job finds the Vision Transformer of a file, whatever the prefix of its names, and prints which one it "
        "took. Missing and unexpected keys are an error that lists them; nothing in a file is executed.", "",
        *places(),
        "## Where the network is", "",
        "In the file itself, in a dictionary such as `state_dict`, `model` or "
        f"`{'` → `'.join(VISSL_STEPS)}` (VISSL), or under a prefix such as `backbone.` (mmdet, mmseg), `model.` or "
        "`visual.trunk.`. What wrappers put into names is skipped: `module.` (DDP), `_orig_mod.` (torch.compile), "
        "`_fsdp_wrapped_module.`, `_checkpoint_wrapped_module.`, and the chunk in DINOv2's `blocks.0.3.`. NumPy arrays "
        "are taken as tensors.", "",
        "Where a file holds two networks, as dictionaries or prefixes, `--checkpoint_key` takes:", "",
        *table(("`teacher` (default)", "`student`", "written by"), pairs), "",
        "Where no row fits, a network with `ema`, `momentum`, `teacher` or `target` in its name, such as `model_ema`, "
        "`state_dict_ema` or `ema_model.`, is the teacher, and the other one is the student. mmengine's EMAHook saves "
        "the average as `state_dict` and the trained network as `ema_state_dict`, so there `state_dict` is the "
        "teacher. The line says which network was taken and what else is in the file.", "",
        "Another key is looked for in the names of dictionaries and prefixes. If several networks fit, the error lists "
        "them.", "",
        "## What its names become", "",
        *table(("a network is where this is", "written by", "its names"),
                [(f"`{name}`", *rest) for name, *rest in PATCH_EMBEDDINGS]), "",
        "Widths of 192, 384, 768 (depth 12) and 96 (depth 4) become `vit_tiny`, `vit_small`, `vit_base` and "
        "`vit_pico`, in float32, of any patch size and square grid, with or without class token and final norm. A "
        "class token without position embedding (DeiT III) gets one of zeros.", "",
        "## What is left out, and named in the line", "",
        *table(("names that start with", "what they are"),
                [(", ".join(f"`{start}`" for start in starts), what) for starts, what in IGNORED]), "",
        "## What is refused", "",
        "This project's backbone does not have these; load such a network with timm.", "",
        *table(("a network with", "for example"), [(what, writer) for what, _, writer in UNSUPPORTED]),
        "| a position embedding of rows and columns | SAM, ViTDet |", "", *heads_and_files()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
