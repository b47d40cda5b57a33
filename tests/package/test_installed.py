"""`pip install .` as another project meets it: a wheel, in an environment of its own, from another folder.

The environment sees the dependencies of the one that runs the tests, but not the checkout. A job started from a
checkout takes the checkout's package, whatever is installed; every other script takes the installed one, wherever it
is started.
"""
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from email import message_from_bytes
from importlib.util import find_spec

import pytest
import torch
from repository import ROOT

import selfpatch
from selfpatch.checkpoints.loading import load_backbone
from selfpatch.method.losses import DINOLoss

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not (find_spec("pip") and find_spec("setuptools")), reason="needs pip and setuptools")]
WEIGHTS = next(ROOT.glob("weights/*.safetensors"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built without network access from a copy, since building leaves files behind."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "LICENSE"]:
        shutil.copy(path, source)
    for folder in ("selfpatch", "detection", "segmentation", "benchmarks"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "tests").mkdir()
    (source / "tests" / "__init__.py").touch()
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
                    "--wheel-dir", output, source], check=True)
    return next(output.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of an environment with the package and its dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    installed, ours = (sysconfig.get_path("purelib", vars={"base": base, "platbase": base})
                       for base in (str(folder), sys.prefix))
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", installed,
                    wheel], check=True)
    with open(os.path.join(installed, "dependencies.pth"), "w") as file:
        file.write(ours + "\n")
    return folder / "bin" / "python"


@pytest.fixture
def run(python, tmp_path):
    """Run words with the environment's Python in an empty folder, and return what they print."""
    def run(*words, cwd=None, **env):
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        inherited = {name: value for name, value in os.environ.items()
                     if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        result = subprocess.run([python, *map(str, words)], cwd=cwd or tmp_path / "elsewhere", text=True, timeout=300,
                                capture_output=True, env=inherited | {"OMP_NUM_THREADS": "1"} | env)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout
    return run


@pytest.fixture
def script(tmp_path):
    """Write a script of another project."""
    def write(text):
        (tmp_path / "project").mkdir(exist_ok=True)
        path = tmp_path / "project" / "script.py"
        path.write_text(textwrap.dedent(text))
        return path
    return write


# ---------------------------------------------------------------- the wheel

def test_the_wheel_holds_the_package_alone(wheel):
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("selfpatch/**/*.py")}
    assert len(modules) > 60 and "selfpatch/method/losses.py" in modules
    information = f"selfpatch-{selfpatch.__version__}.dist-info/"
    with zipfile.ZipFile(wheel) as archive:
        assert set(archive.namelist()) == modules | {"selfpatch/py.typed"} | {
            information + name for name in ("METADATA", "WHEEL", "RECORD", "top_level.txt", "licenses/LICENSE")}
        metadata = message_from_bytes(archive.read(f"{information}METADATA"))
    assert metadata["Version"] == selfpatch.__version__
    required = {line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert required == set((ROOT / "requirements.txt").read_text().split())


# ---------------------------------------------------------------- one process

def test_features_and_a_loss_from_another_project(run, script, tmp_path):
    path = script("""
        import sys
        import selfpatch
        assert "torch" not in sys.modules  # importing the package is instant
        import torch
        from selfpatch import load_backbone
        from selfpatch.method.losses import DINOLoss

        images, weights, output = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(0)), *sys.argv[1:]
        backbone = load_backbone(weights)
        features = backbone(images)

        class Doubled(DINOLoss):
            def forward(self, *args, **kwargs):
                return 2 * super().forward(*args, **kwargs)

        torch.save({"features": features.detach(), "loss": Doubled(8, 8, 4).state_dict()}, output)
        print(selfpatch.__file__, selfpatch.__version__)
    """)
    found, version = run(path, WEIGHTS, tmp_path / "output.pth").split()[-2:]
    assert "site-packages" in found and version == selfpatch.__version__
    output = torch.load(tmp_path / "output.pth")
    images = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(output["features"], load_backbone(WEIGHTS)(images))
    assert output["loss"].keys() == DINOLoss(8, 8, 4).state_dict().keys()


def test_which_one_wins_next_to_a_checkout(run, script):
    path = script("import selfpatch; print(selfpatch.__file__)")
    checkout = str(ROOT / "selfpatch" / "__init__.py")
    assert run(path, cwd=ROOT).strip() != checkout  # a script elsewhere: the installed one
    assert run("-c", path.read_text(), cwd=ROOT).strip() == checkout  # Python puts the current folder first
    assert run("-c", path.read_text()).strip() != checkout
    assert run(path, PYTHONPATH=str(ROOT)).strip() == checkout


DINO = {"utils.py": "def bool_flag(text):\n    return 'of DINO'\n",
        "vision_transformer.py": "import utils\n\nclass VisionTransformer:\n    told = utils.bool_flag('')\n"}


def test_beside_dinos_repository(run, script):
    """Each project's modules stay its own, whichever is imported first, and a job of the checkout can join them."""
    path = script(f"""
        import sys
        from pathlib import Path

        def import_dino():
            import utils, vision_transformer
            assert vision_transformer.VisionTransformer.told == "of DINO" == utils.bool_flag("true")
            assert Path(utils.__file__).parent == Path(__file__).parent

        def import_ours():
            from selfpatch.checkpoints.loading import load_backbone
            from selfpatch.method.vision_transformer import VisionTransformer, vit_tiny
            from selfpatch.pretraining.options import bool_flag
            assert bool_flag("true") is True and isinstance(vit_tiny(), VisionTransformer)
            assert load_backbone({str(WEIGHTS)!r}).embed_dim

        for order in (import_dino, import_ours), (import_ours, import_dino):
            for step in order:
                step()
            for name in [name for name in sys.modules
                         if name.partition(".")[0] in ("selfpatch", "utils", "vision_transformer")]:
                del sys.modules[name]
        import_dino()
        sys.path.append({str(ROOT)!r})
        import main_selfpatch
        import_dino()
        assert issubclass(main_selfpatch.FusedDINOLoss, main_selfpatch.DINOLoss)
        print("both")
    """)
    for name, text in DINO.items():
        (path.parent / name).write_text(text)
    assert run(path).endswith("both\n")


# ---------------------------------------------------------------- several processes

@pytest.mark.long
def test_spawned_workers(run, script, image_folder):
    """Workers that are spawned, as on macOS and Windows, give the batches of this process."""
    path = script("""
        import multiprocessing, sys
        import torch
        from selfpatch.data.dataset import build_dataset
        from selfpatch.data.loader import CropLoader

        def first_batch(num_workers):
            dataset = build_dataset(sys.argv[1], global_crops_size=32, local_crops_size=32, local_crops_number=2,
                                    augment="pil")
            loader = CropLoader(dataset, batch_size=4, num_workers=num_workers)
            crops = next(iter(loader))
            loader.close()
            return crops

        if __name__ == "__main__":
            multiprocessing.set_start_method("spawn")
            assert all(map(torch.equal, first_batch(1), first_batch(0)))
            print("same")
    """)
    assert run(path, image_folder) == "same\n"


@pytest.mark.long
def test_ranks_of_another_projects_script(run, script):
    path = script("""
        import selfpatch, torch
        from torch import distributed as dist
        from selfpatch.distributed.processes import init_distributed_mode, leave_processes
        from selfpatch.method.losses import DINOLoss

        processes = init_distributed_mode("cpu")
        total = torch.ones(1)
        dist.all_reduce(total)
        assert processes.world_size == total == 2 and DINOLoss(8, 8, 4)
        if processes.rank == 0:
            print(selfpatch.__file__)
        leave_processes()
    """)
    output = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", path, cwd=ROOT)
    assert "site-packages" in output.splitlines()[-1]


@pytest.mark.long
def test_a_submitit_job_of_another_project(run, script, tmp_path):
    pytest.importorskip("submitit", reason="submitit is optional: pip install submitit")
    path = script("""
        import sys
        import submitit

        def width(weights):
            import selfpatch
            return selfpatch.__file__, selfpatch.load_backbone(weights).embed_dim

        if __name__ == "__main__":
            executor = submitit.AutoExecutor(folder=sys.argv[2], cluster="local")
            executor.update_parameters(timeout_min=5)
            print(*executor.submit(width, sys.argv[1]).result())
    """)
    found, width = run(path, WEIGHTS, tmp_path / "logs").split()
    assert "site-packages" in found and int(width) == load_backbone(WEIGHTS).embed_dim
