"""Entry points for torch.hub.

    model = torch.hub.load("/path/to/this/checkout", "vit_small", pretrained="/path/to/checkpoint.pth", source="local")
    features = model(images)    # [B, 3, H, W] -> [B, N, D], row by row

torch.hub.list shows every public name of this module, so the imports have private names.
"""
import ast as _ast
import importlib as _importlib
import importlib.machinery as _machinery
import importlib.util as _util
import os as _os
import sys as _sys
import zlib as _zlib
from pathlib import Path as _Path

dependencies = ["torch", "timm", "safetensors"]

# ----------------------------------------------------------------------------------------------------------------------
# Modules as common as utils and vision_transformer are in other projects too, DINO among them. So ours are loaded as
# members of a package whose name is this folder's alone: vision_transformer as selfpatch_1a2b3c4d.vision_transformer.
# The time of the newest module is in the name too, so that torch.hub.load(force_reload=True) loads what it fetched

_FOLDER = _Path(__file__).resolve().parent
_NEWEST = max(file.stat().st_mtime_ns for file in _FOLDER.glob("*.py"))
_PACKAGE = f"selfpatch_{_zlib.crc32(f'{_FOLDER} {_NEWEST}'.encode()):08x}"


def _is_ours(name: str) -> bool:
    return (_FOLDER / f"{name}.py").is_file()


class _RelativeImports(_ast.NodeTransformer):
    """Makes a script's `import utils` and `from utils import x` imports from the package that it is in."""

    def visit_ImportFrom(self, node: _ast.ImportFrom) -> _ast.AST:
        if node.level == 0 and _is_ours(node.module):
            node.level = 1
        return node

    def visit_Import(self, node: _ast.Import) -> list[_ast.AST]:
        statements = [_ast.ImportFrom(None, [name], 1) if _is_ours(name.name) else _ast.Import([name])
                      for name in node.names]
        return [_ast.copy_location(statement, node) for statement in statements]


class _Loader(_machinery.SourceFileLoader):
    def get_code(self, fullname: str):
        # never from the cache of bytecode, which the plain modules use
        tree = _RelativeImports().visit(_ast.parse(self.get_data(self.path), self.path))
        return compile(_ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)


class _Finder:
    @staticmethod
    def find_spec(fullname: str, path=None, target=None) -> _machinery.ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != _PACKAGE or not _is_ours(name):
            return None
        file = str(_FOLDER / f"{name}.py")
        return _util.spec_from_file_location(fullname, file, loader=_Loader(fullname, file))


def _import_ours(name: str):
    """A module of this folder, whatever else of that name is loaded or on sys.path; neither is changed."""
    if _PACKAGE not in _sys.modules:
        _sys.modules[_PACKAGE] = _util.module_from_spec(_machinery.ModuleSpec(_PACKAGE, None, is_package=True))
        _sys.meta_path.append(_Finder)
    return _importlib.import_module(f"{_PACKAGE}.{name}")


# ----------------------------------------------------------------------------------------------------------------------
# The entries


def _load(arch: str, pretrained: str, checkpoint_key: str, patch_size: int | None,
          kwargs: dict):
    if isinstance(pretrained, bool):
        raise ValueError(f"pretrained={pretrained}: give the path of a checkpoint, or omit it for random weights")
    pretrained = _os.path.expanduser(pretrained or "")
    return _import_ours("checkpoints").load_backbone(pretrained, checkpoint_key, arch, patch_size,
                                                     random_weights=not pretrained, **kwargs)


def vit_tiny(pretrained: str = "", checkpoint_key: str = "teacher", patch_size: int | None = None, **kwargs):
    """ViT-Ti, embedding dimension 192, in eval mode.

    Args:
        pretrained: any checkpoint that this project reads; empty gives random weights and prints a line saying so.
        checkpoint_key: network of a training run, teacher or student.
        patch_size: default: the file's own, or 16 without a file.
        kwargs: further arguments of VisionTransformer, such as drop_path_rate.

    Raises:
        ValueError: the file is not a checkpoint or does not fit.
    """
    return _load("vit_tiny", pretrained, checkpoint_key, patch_size, kwargs)


def vit_small(pretrained: str = "", checkpoint_key: str = "teacher", patch_size: int | None = None, **kwargs):
    """ViT-S, embedding dimension 384; see vit_tiny for the arguments."""
    return _load("vit_small", pretrained, checkpoint_key, patch_size, kwargs)


def vit_base(pretrained: str = "", checkpoint_key: str = "teacher", patch_size: int | None = None, **kwargs):
    """ViT-B, embedding dimension 768; see vit_tiny for the arguments."""
    return _load("vit_base", pretrained, checkpoint_key, patch_size, kwargs)
