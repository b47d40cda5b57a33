"""Where weights are: a file, a folder, an address, or a repository of the Hugging Face Hub.

    resolve_path("runs/one")                                    # runs/one/checkpoint.pth
    resolve_path("https://host/vit-0123abcd.pth")               # downloaded once; its SHA-256 begins with 0123abcd
    resolve_path("hf-hub:timm/vit_small_patch16_224.dino")      # through huggingface_hub and its cache
"""
import contextlib
import hashlib
import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

import torch
from filelock import FileLock

from selfpatch.checkpoints.files import CheckpointError, read_checkpoint
from selfpatch.distributed.processes import on_main_process
from selfpatch.whole_files import whole_file, write_errors

HUB, ADDRESSES = "hf-hub:", ("https://", "http://")
FORMS = "a checkpoint of any kind, a folder with one, https://… or hf-hub:NAME"  # for the help of options
CONFIG = "config.json"
PUBLISHED = ("model.safetensors", "pytorch_model.bin")  # beside config.json, in timm's and Hugging Face's folders
FILES = ("checkpoint.pth", *PUBLISHED)  # in this order
CHECKSUM = re.compile(r"-(?!(?:19|20)\d{6}\.)([0-9a-f]{8,64})\.")  # as torch.hub names files; 20240131 is a date
TIMEOUT = 60  # seconds without an answer


def is_remote(path: str | Path) -> bool:
    """Whether weights have to be downloaded, unless the cache has them."""
    return str(path).startswith((HUB, *ADDRESSES))


def resolve_path(path: str | Path) -> Path:
    """Return the file of weights: in a folder, in the cache of what is downloaded, or the path itself.

    A folder is that of a run (checkpoint.pth), of timm or of Hugging Face (model.safetensors, pytorch_model.bin).

    Raises:
        CheckpointError: the folder has no such file, or the download fails.
        WriteError: the cache cannot be written.
    """
    if not str(path):
        raise CheckpointError("the path of the checkpoint is empty")
    if str(path).startswith(ADDRESSES):
        return download(str(path))
    if str(path).startswith(HUB):
        return from_hub(str(path).removeprefix(HUB))
    path = Path(os.path.expanduser(path))
    found = [path / name for name in FILES if os.path.isfile(path / name)]
    if not found and os.path.isdir(path):
        raise CheckpointError(f"{path} cannot be read: Is a directory without {', '.join(FILES)}")
    return found[0] if found else path


def download_first(paths: list[str]) -> None:
    """Download what is remote on rank 0, while the other ranks wait; every rank must call it."""
    if remote := [path for path in paths if is_remote(path)]:
        on_main_process(lambda: [resolve_path(path) for path in remote])


def download(url: str) -> Path:
    """Return the file of an address in torch.hub's cache; one process downloads it, others wait for it.

    Each address has a folder of its own: checkpoint.pth of one server is not that of another.
    """
    with explained(url):
        name = re.sub(r"[^\w.-]", "_", urlsplit(url).path.rpartition("/")[2]).strip(".")[-100:] or "weights"
    digest = hashlib.sha256(url.encode(errors="surrogateescape")).hexdigest()[:16]
    file = Path(torch.hub.get_dir()).absolute() / "checkpoints" / "selfpatch" / digest / name
    if file.is_file():
        return file
    with write_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_name(f".{name}.lock")):
            if not file.is_file():  # no other process was first
                fetch(url, file)
    return file


def fetch(url: str, file: Path) -> None:
    """Download a checkpoint through torch.hub; the file appears once it can be read and has its name's checksum."""
    checksum, timeout = CHECKSUM.search(file.name), socket.getdefaulttimeout()
    print(f"downloading {url} to {file}", file=sys.stderr)
    socket.setdefaulttimeout(TIMEOUT)  # torch.hub sets none
    try:
        with whole_file(file) as temporary, explained(url):
            torch.hub.download_url_to_file(url, str(temporary), checksum and checksum[1], sys.stderr.isatty())
            try:
                read_checkpoint(temporary)
            except CheckpointError as error:
                raise CheckpointError(str(error).replace(str(temporary), url)) from None
    finally:
        socket.setdefaulttimeout(timeout)


def from_hub(name: str) -> Path:
    """Return the weights of a repository, NAME or NAME@REVISION, in Hugging Face's cache; its config.json lies beside.

    huggingface_hub lets one process download while others wait, and takes what the cache has where HF_HUB_OFFLINE is 1.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    repository, _, revision = name.partition("@")
    with write_errors(Path(HF_HUB_CACHE)), explained(f"{HUB}{name}"):
        try:
            for file in FILES:
                with contextlib.suppress(EntryNotFoundError):
                    path = Path(hf_hub_download(repository, file, revision=revision or None))
                    with contextlib.suppress(EntryNotFoundError):
                        hf_hub_download(repository, CONFIG, revision=path.parent.name)
                    return path
        except HfHubHTTPError as error:  # an OSError, but not of the disk: no such repository, or no access
            raise ValueError(error) from None
        raise ValueError(f"neither it nor the cache has {' or '.join(FILES)}, or the Hub does not answer")


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn what goes wrong in a download into one line; errors of the disk stay as they are."""
    try:
        yield
    except CheckpointError:
        raise
    except (URLError, HTTPException, ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
        about = error if isinstance(error, HTTPError) else getattr(error, "reason", "") or error
        reason = str(about).strip() or type(error).__name__
        hint = "; the digits in its name are taken for its SHA-256: if they are none, download it and give the file"
        raise CheckpointError(f"{what} cannot be downloaded: {reason.splitlines()[0]}"
                              + hint * ("invalid hash" in reason)) from None


def recorded_heads(path: Path) -> dict[str, str]:
    """Number of attention heads in the config.json beside published weights, as num_heads; empty if it has none.

    Raises:
        CheckpointError: the file is not JSON.
    """
    config = path.with_name(CONFIG)
    if path.name not in PUBLISHED or not config.is_file():
        return {}
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{config} cannot be read ({error}): download or copy it again") from None
    content = content if isinstance(content, dict) else {}
    options = content.get("model_args")
    heads = (options if isinstance(options, dict) else {}).get("num_heads") or content.get("num_attention_heads")
    return {"num_heads": str(heads)} if heads else {}
