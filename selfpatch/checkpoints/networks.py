"""Find the Vision Transformers in a checkpoint, and choose one by its key."""
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from selfpatch.checkpoints.layouts import GENERIC_STUDENTS, NETWORKS, PATCH_EMBEDDINGS, WRAPPERS, LayoutError

AVERAGED = re.compile(r"(^|_)(ema|momentum|teacher|target)(_|$)")  # words that name a moving average
LARGEST = 1_000_000  # tensors or dictionaries: a small file can refer to one dictionary millions of times
DEEPEST = 5  # nested dictionaries


@dataclass(frozen=True)
class Network:
    """A Vision Transformer in a checkpoint.

    Attributes:
        path: keys of the nested dictionaries down to the one with its tensors, such as ("state_dict",).
        prefix: common start of its names in that dictionary.
        tensors: all tensors of that dictionary, without the prefixes of wrappers; see strip_wrappers.
        role: teacher or student if the file has two networks or names its only one so, otherwise None.
        kind: of the file, if the names tell.
    """
    path: tuple[str, ...]
    prefix: str
    tensors: dict[str, torch.Tensor]
    role: str | None = None
    kind: str | None = None

    @property
    def words(self) -> list[str]:
        return [*self.path, *self.prefix.split(".")[:-1]]

    @property
    def name(self) -> str:
        """Its name in messages: path and prefix without the usual wrappers; may be empty."""
        path = [word for word in self.path if word not in WRAPPERS] or ([] if self.prefix else self.path)
        return "".join(f"{word}." for word in path) + self.prefix


def _dictionaries(content: dict) -> Iterator[tuple[tuple[str, ...], dict]]:
    """Yield (path, dictionary) for the content and its nested dictionaries, up to five deep, except optimizers'."""
    left, count = deque([((), content, (id(content),))]), 0
    while left:
        path, part, parents = left.popleft()
        yield path, part
        if len(path) == DEEPEST:
            continue
        for name, value in part.items():
            if isinstance(value, dict) and id(value) not in parents and not str(name).startswith("optim"):
                left.append(((*path, str(name)), value, (*parents, id(value))))
                count += 1
                if count > LARGEST:
                    raise LayoutError(f"more than {LARGEST} dictionaries")


def collect_tensors(content: dict, nested: bool = False) -> dict[str, torch.Tensor]:
    """Collect the tensors of a dictionary by name; NumPy arrays of numbers become tensors.

    Args:
        nested: include nested dictionaries, up to five deep, with dots between the names.

    Raises:
        LayoutError: more than a million dictionaries or tensors.
    """
    tensors = {}
    for path, part in _dictionaries(content) if nested else [((), content)]:
        for name, value in part.items():
            if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
                value = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
            if isinstance(value, torch.Tensor):
                tensors[".".join((*path, str(name)))] = value
        if len(tensors) > LARGEST:
            raise LayoutError(f"more than {LARGEST} tensors")
    return tensors


def strip_wrappers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove from names what DDP, torch.compile, FSDP, activation checkpointing and DINOv2's chunks add.

    Raises:
        LayoutError: two tensors get the same name.
    """
    short = {}
    for name, tensor in tensors.items():
        name = re.sub(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "", name)
        name = re.sub(r"(^|\.)blocks\.\d+\.(\d+)\.", r"\1blocks.\2.", name)  # blocks.0.3. is block 3, in chunk 0
        short[re.sub(r"^(module\.)+", "", name)] = tensor
    if len(short) < len(tensors):
        raise LayoutError("it has the same keys with and without the prefix module. or _orig_mod.")
    return short


def find_prefixes(names: dict | list) -> list[str]:
    """Find the prefixes of Vision Transformers, such as "" or "visual.trunk.", in the file's order."""
    prefixes = {}
    for name in names:
        for end, *_ in PATCH_EMBEDDINGS:
            if f".{name}".endswith(f".{end}"):
                prefixes[name[:len(name) - len(end)]] = None
    return list(prefixes)


def list_networks(content: dict) -> list[Network]:
    """List the Vision Transformers in a checkpoint with their roles.

    Raises:
        LayoutError: see collect_tensors and strip_wrappers.
    """
    found = []
    for path, part in _dictionaries(content):
        tensors = collect_tensors(part)
        if find_prefixes(tensors):
            tensors = strip_wrappers(tensors)
            found += [Network(path, prefix, tensors) for prefix in find_prefixes(tensors)]
    if not found:  # a network with one dictionary per module
        tensors = strip_wrappers(collect_tensors(content, nested=True))
        found = [Network((), prefix, tensors) for prefix in find_prefixes(tensors)]
    return _with_roles(found, _swapped_average(content))


def _swapped_average(content: dict) -> bool:
    """Whether mmengine wrote the file: its EMAHook saves the average as state_dict, the other as ema_state_dict."""
    meta = content.get("meta")
    return "message_hub" in content or isinstance(meta, dict) and "mmengine_version" in meta


def _with_roles(found: list[Network], swapped: bool) -> list[Network]:
    """Tell teachers from students by the table NETWORKS, or else by words such as ema in only one name."""
    words = {word for network in found for word in network.words}
    pairs = [row for row in NETWORKS if row[0] in words and row[1] in words]
    named = [replace(network, **_named_role(network, pairs)) for network in found]
    if not any(network.role == "teacher" for network in named) and len(found) > 1:
        averaged = [any(map(AVERAGED.search, network.words)) for network in named]
        if swapped and ("ema_state_dict",) in [network.path for network in named]:
            averaged = [network.path == ("state_dict",) for network in named]
        named = [replace(network, role="teacher") if is_average else network
                 for network, is_average in zip(named, averaged, strict=True)]
    if {network.role for network in named} == {"teacher", None}:  # the other one is the student
        kind = next(network.kind for network in named if network.role)
        named = [network if network.role else replace(network, role="student", kind=kind) for network in named]
    return named


def _named_role(network: Network, pairs: list[tuple]) -> dict[str, str | None]:
    """Look up role and kind in the table; pairs are the rows with both networks in the file."""
    words = network.words
    for teacher, student, kind, _ in pairs or NETWORKS:
        if teacher in words:
            kinds = {kind for name, _, kind, _ in pairs or NETWORKS if name == teacher}
            return {"role": "teacher", "kind": kind if len(kinds) == 1 else "run"}
        if student in words and (pairs or student not in GENERIC_STUDENTS):
            return {"role": "student", "kind": kind}
    return {}


def choose_network(found: list[Network], key: str) -> Network | None:
    """Choose a network by its key; None if there is none.

    Args:
        found: result of list_networks.
        key: teacher (a network without a role counts as one), student, or a word of the network's path or prefix, such
            as momentum_encoder.

    Raises:
        LayoutError: several networks fit.
    """
    fits = [network for network in found if network.role == key]
    fits = fits or [network for network in found
                    if key.strip(".") and f".{key.strip('.')}." in f".{'.'.join(network.words)}."]
    if not fits and key == "teacher":
        fits = [network for network in found if network.role is None]
        # a detector or segmenter may have another Vision Transformer in its heads
        fits = [network for network in fits if network.prefix == "backbone."] or fits
    if len(fits) > 1:
        raise LayoutError(
            f"it holds several Vision Transformers, under {', '.join(one.name or 'no prefix' for one in fits)}: "
            "give the one to load as the key (--checkpoint_key)")
    return fits[0] if fits else None
