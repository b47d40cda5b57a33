"""What must not become a figure: features that are not finite, files that cannot be read, names that clash."""
import argparse
import multiprocessing
import shutil

import numpy as np
import pytest
import torch
from dense_data import make_folders
from evaluation_jobs import run_job

import discover_objects
import eval_dense_retrieval
import eval_knn
import eval_linear
import eval_linear_segmentation
from selfpatch.errors import ConfigError
from selfpatch.evaluation.common import evaluate_each
from selfpatch.evaluation.dense_retrieval import PatchMemory
from selfpatch.evaluation.image_features import PatchFeature, check_finite
from selfpatch.evaluation.knn import class_ranks, classify
from selfpatch.evaluation.linear_segmentation import LinearHead, window_starts
from selfpatch.evaluation.model_options import Candidate, row_names
from selfpatch.evaluation.object_discovery import cut_vector, tokencut
from selfpatch.evaluation.tables import folder_names, unique_names
from selfpatch.method.vision_transformer import vit_tiny

NAN = float("nan")


def test_features_that_are_not_finite_are_an_error_and_no_hits():
    with pytest.raises(ConfigError, match="NaN or infinite: use --precision fp32"):
        check_finite(torch.tensor([1.0, NAN]))
    ranks = class_ranks(torch.full((3, 2), NAN), torch.zeros(3, 2, dtype=torch.long), torch.tensor([0, 1, 2]), 4)
    assert (ranks > 0).all()


def test_memory_and_queries_that_are_not_finite():
    memory, rows = PatchMemory(8, 4, 2), torch.ones(3, 4)
    bad = torch.tensor([[1.0, NAN, 1.0, 1.0], [1.0, float("inf"), 1.0, 1.0]])
    memory.add(rows, torch.eye(2)[[0, 1, 1]])
    for one in bad:
        with pytest.raises(ConfigError, match="^some features are NaN or infinite"):
            memory.add(one[None], torch.eye(2)[:1])
        with pytest.raises(ConfigError, match="^some features are NaN or infinite"):
            memory.vote(torch.stack([rows[0], one]))
    assert len(memory) == 3


@pytest.mark.parametrize("job", [eval_dense_retrieval, eval_linear_segmentation, discover_objects])
def test_a_dense_job_whose_features_are_not_finite(job, tmp_path, monkeypatch, capsys):
    folders, network = make_folders(tmp_path, 2), vit_tiny(32)
    with torch.no_grad():  # weights are finite, as those of a checkpoint must be; their products are not
        network.blocks[-1].norm1.weight[0], network.blocks[-1].attn.qkv.weight[network.embed_dim, 0] = 1e38, 1e4
    torch.save(network.state_dict(), tmp_path / "large.pth")
    words = ["--data", f"folders:{folders}", "--pretrained_weights", tmp_path / "large.pth", "--num_workers", 0,
             "--device", "cpu"]
    if job is not discover_objects:
        words += ["--num_classes", 3]
    if job is eval_linear_segmentation:  # training would find it by the loss
        monkeypatch.setattr(job, "train", lambda feature, data, *_: LinearHead(feature.dim, data.num_classes).eval())
    assert run_job(job, *words) == 2
    err = capsys.readouterr().err
    assert "some features are NaN or infinite" in err
    assert job is not discover_objects or f"{tmp_path}/images/train/0.jpg: some" in err


def test_an_image_of_too_many_patches_is_named(monkeypatch):
    monkeypatch.setattr(discover_objects, "MAX_PATCHES", 5)
    with pytest.raises(ConfigError, match="^photos/a.jpg: an image of 96×64 has 6 patches of 32, more than 5"):
        discover_objects.discover(PatchFeature(vit_tiny(32)), torch.zeros(3, 64, 96, dtype=torch.uint8), None,
                                  torch.device("cpu"), "photos/a.jpg")


def test_votes_at_a_low_temperature():
    rows, labels = torch.nn.functional.normalize(torch.randn(50, 8), dim=1), torch.arange(50) % 7
    assert classify(rows, labels, rows, labels, 7, ks=[5], temperature=0.001)[5].top1 == 100


def test_a_lost_connection_is_one_line(monkeypatch):
    """What gloo raises in the other ranks when one ends with an error; any other RuntimeError stays what it is."""
    network = Candidate("a", torch.nn.Linear(1, 1), None)

    def lose(message):
        def fail(candidate):
            raise RuntimeError(message)
        return evaluate_each([network], fail, torch.device("cpu"))

    closed = "[third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer"
    with pytest.raises(RuntimeError, match="Connection closed"):
        lose(closed)
    monkeypatch.setattr("selfpatch.evaluation.common.is_distributed", lambda: True)
    with pytest.raises(ConfigError, match="^another process of this job has ended: its own message says why$"):
        lose(closed)
    with pytest.raises(RuntimeError, match="shapes"):
        lose("shapes differ")


def test_nothing_to_classify():
    rows, none = torch.ones(3, 2), torch.ones(0, 2)
    with pytest.raises(ConfigError, match="none of the test images"):
        classify(none, torch.zeros(0, dtype=torch.long), rows, torch.zeros(3, dtype=torch.long), 2)
    with pytest.raises(ConfigError, match="none of the training images"):
        classify(rows, torch.zeros(3, dtype=torch.long), none, torch.zeros(0, dtype=torch.long), 2)


def test_names_are_unique():
    assert row_names(["a/w.pth", "b/w.pth"]) == ["a/w.pth", "b/w.pth"]
    for paths in (["w.pth", "w.pth"], ["random"], ["random", "random", "x"], ["x.pth", "x.pth", "x.pth (2)"]):
        names = row_names(paths)
        assert len({*names, "random"}) == len(paths) + 1
    assert row_names(["x.pth", "x.pth", "x.pth (2)"]) == ["x.pth", "x.pth (3)", "x.pth (2)"]


def test_folders_are_unique_and_stay_where_they_belong(tmp_path):
    assert folder_names(["a_ck.pth", "a/ck.pth", "random"]) == ["a_ck.pth", "a_ck.pth (2)", "random"]
    assert folder_names(["..", ".", "../.."]) == ["backbone", "backbone (2)", ".._.."]
    candidates = [Candidate(name, None, None) for name in ("a_ck.pth", "a/ck.pth", "..")]
    args = argparse.Namespace(dump_features=tmp_path, overwrite=False)
    folders = eval_knn.dump_folders(args, candidates)
    assert {folder.parent for folder in folders.values()} == {tmp_path} and len(set(folders.values())) == 3
    assert eval_knn.dump_folders(args, candidates[:1]) == {"a_ck.pth": tmp_path}


def test_images_have_names_of_their_own():
    assert unique_names(["a.jpg", "a.png", "a.jpg.png"]) == ["a.jpg", "a.png", "a.jpg (2)"]
    assert unique_names(["../a.jpg", "a.jpg"]) == ["a.jpg", "a.jpg (2)"]


def test_an_image_of_one_patch():
    assert cut_vector(torch.randn(1, 4), 0.2, 1e-5).tolist() == [1.0]
    assert np.array_equal(tokencut(torch.randn(1, 4), (1, 1)), [[True]])


def test_the_stride_of_windows_is_the_published_one(monkeypatch):
    import eval_linear_segmentation as job
    assert job.STRIDE == 341 and window_starts(853, 512, job.STRIDE) == [0, 341]


@pytest.mark.parametrize("job, words, says", [
    (eval_linear, ["--lr", "0.1", "nan"], "--lr: it is nan"), (eval_knn, ["--seed", "-1"], "--seed: it is -1"),
    (eval_knn, ["--image_size", "16", "--patch_size", "32"], "--image_size 16 is smaller than a patch"),
    (eval_dense_retrieval, ["--seed", "-1"], "--seed: it is -1")])
def test_options(image_folder, tmp_path, capsys, job, words, says):
    for part in ("train", "val"):
        shutil.copytree(image_folder, tmp_path / part)
    for path in (tmp_path / "val").rglob("*.jpg"):
        path.rename(path.with_name(f"1{path.name}"))
    data = ["--data", f"folders:{tmp_path},{tmp_path}"] if job is eval_dense_retrieval else ["--data_path", tmp_path]
    assert run_job(job, *data, "--random_weights", "--arch", "vit_tiny", *words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and says in err


@pytest.mark.parametrize("job", [discover_objects, eval_dense_retrieval, eval_knn, eval_linear,
                                 eval_linear_segmentation], ids=lambda job: job.__name__)
def test_in_a_notebook_and_in_a_daemonic_process(monkeypatch, job):
    data = ["--data_path"] if job in (eval_knn, eval_linear) else ["--data"]
    args = job.get_args_parser().parse_args([*data, "none", "--num_workers", "2", "--device", "cpu"])
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    with pytest.raises(ConfigError, match="--num_workers 2: this process is daemonic.* give --num_workers 0"):
        job.main(args)
    args.seed = None
    with pytest.raises(ConfigError, match="--seed is None: it must be of type int, at least 0"):
        job.main(args)
