"""Dense retrieval against the reference program's figures, and what chunks and processes may not change."""
from itertools import permutations

import numpy as np
import pytest
import torch
from forked import run_ranks
from golden_rules import assert_close, load, rand

from selfpatch.distributed.processes import leave_processes
from selfpatch.evaluation.dense_retrieval import PatchMemory, label_map, patch_labels, patch_scores, sample_patches
from selfpatch.evaluation.knn import nearest
from selfpatch.evaluation.segmentation import IGNORE, confusion_matrix, match_predictions, mean_iou

CLASSES = 6


@pytest.fixture(scope="module")
def golden():
    return load("dense_retrieval.npz")


def golden_masks(golden):
    integers = np.random.RandomState(400 + int(golden["salt"])).randint(0, CLASSES, (12, 1, 4, 4))
    masks = torch.from_numpy(integers)[:, 0].repeat_interleave(8, 1).repeat_interleave(8, 2)
    masks[:, 3:11, 5:17] = 2
    return masks


def golden_features(golden, labels):
    salt = golden["salt"]
    return labels @ rand(401, CLASSES, 16, salt=salt) + 1.2 * rand(402, 12, 8, 8, 16, salt=salt)


def golden_memory(golden, dtype):
    labels = patch_labels(golden_masks(golden), CLASSES, 4)
    features = golden_features(golden, labels)
    memory = PatchMemory(8 * 64, 16, CLASSES, dtype=dtype)
    for i in range(8):
        memory.add(features[i].flatten(0, 1), labels[i].flatten(0, 1))
    return memory, features[8:].flatten(0, 2)


def test_golden_patch_labels_and_scores(golden):
    labels = patch_labels(golden_masks(golden), CLASSES, 4)
    assert_close(labels, golden["patch_labels"])
    assert_close(patch_scores(labels[0].flatten(0, 1)).reshape(8, 8), golden["patch_scores"])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 5e-3)])
def test_golden_votes_and_scores(golden, dtype, tolerance):
    memory, queries = golden_memory(golden, dtype)
    votes = memory.vote(queries).reshape(4, 64, CLASSES)
    assert_close(votes, golden["vote"], tolerance)
    maps = torch.stack([label_map(one.reshape(8, 8, CLASSES), (32, 32)) for one in votes])
    differing = (maps != torch.from_numpy(golden["maps"])).sum()
    assert differing == 0 if dtype == torch.float32 else differing <= 4
    truth = golden_masks(golden)[8:]
    truth[:, :2] = IGNORE
    confusion = confusion_matrix(truth, maps, CLASSES).numpy()
    assert np.abs(confusion - golden["confusion"]).sum() <= 2 * differing
    precision = 1e-9 if dtype == torch.float32 else 2e-3
    assert mean_iou(confusion) == pytest.approx(float(golden["miou"]), abs=precision)
    assert mean_iou(match_predictions(confusion)) == pytest.approx(float(golden["miou_hungarian"]), abs=precision)
    renamed = confusion_matrix(truth, torch.tensor([3, 0, 5, 1, 2, 4])[maps], CLASSES).numpy()
    assert mean_iou(renamed) == pytest.approx(float(golden["miou_permuted"]), abs=precision)
    assert mean_iou(match_predictions(renamed)) == pytest.approx(float(golden["miou_permuted_hungarian"]),
                                                                 abs=precision)


@pytest.mark.parametrize("query_rows, memory_rows", [(1, 512), (7, 31), (64, 10), (1000, 100000)])
def test_chunks_change_nothing(golden, query_rows, memory_rows):
    memory, queries = golden_memory(golden, torch.float16)
    expected = memory.vote(queries)
    torch.testing.assert_close(memory.vote(queries, query_rows=query_rows, memory_rows=memory_rows), expected,
                               rtol=0, atol=1e-7)


def test_chunks_change_no_bit_of_what_is_nearest():
    """Also where rows are copies of one another: of these, the first ones are found."""
    bank = torch.nn.functional.normalize(torch.randn(400, 48), dim=1)
    bank[200:206], bank[301:305] = bank[0], bank[1] * (1 + 1e-7)
    queries = torch.cat([bank[:2], torch.nn.functional.normalize(torch.randn(30, 48), dim=1)])
    expected = nearest(queries, bank, 4)
    assert expected[1][0].tolist() == [0, 200, 201, 202]
    for query_rows, bank_rows in ((1, 400), (7, 31), (32, 10), (5, 399)):
        for ours, theirs in zip(nearest(queries, bank, 4, query_rows, bank_rows), expected, strict=True):
            assert torch.equal(ours, theirs)
    exact = (queries.double() @ bank.double().T).topk(4, dim=1)
    torch.testing.assert_close(expected[0], exact.values.float())


@pytest.mark.long
def test_two_hundred_thousand_rows():
    """A fifth of the usual memory: 154 MB, and the same votes in chunks of any size."""
    memory = PatchMemory(200_000, 384, 21)
    for _ in range(20):
        memory.add(torch.randn(10_000, 384), torch.eye(21)[torch.randint(21, (10_000,))])
    assert len(memory) == 200_000 and memory.features.nbytes == 200_000 * 384 * 2
    queries = torch.randn(300, 384)
    assert torch.equal(memory.vote(queries), memory.vote(queries, query_rows=100, memory_rows=7000))


def test_fewer_rows_than_neighbours():
    memory = PatchMemory(5, 8, 3)
    memory.add(torch.randn(4, 8), torch.eye(3)[torch.tensor([0, 1, 2, 2])])
    votes = memory.vote(torch.randn(10, 8))
    torch.testing.assert_close(votes.sum(1), torch.ones(10))
    with pytest.raises(ValueError, match="6 rows in a memory for 5"):
        memory.add(torch.randn(2, 8), torch.eye(3)[:2])


def test_sampling_prefers_rare_classes():
    """Of 96 patches of one class and 4 of another, the 4 are nearly always among the 10 taken."""
    labels = torch.eye(2)[torch.tensor([0] * 96 + [1] * 4)]
    assert patch_scores(labels).tolist() == [96.0] * 96 + [4.0] * 4
    taken = [set(sample_patches(labels, 10, torch.Generator().manual_seed(seed)).tolist()) for seed in range(50)]
    assert all(len(one) == 10 for one in taken)
    assert sum(len(one & {96, 97, 98, 99}) for one in taken) > 0.9 * 4 * 50
    assert len({frozenset(one) for one in taken}) > 40
    assert len(sample_patches(labels, 1000)) == 100


def test_classes_without_pixels():
    confusion = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    assert mean_iou(confusion) == pytest.approx((3 / 4 + 4 / 5) / 3)
    assert mean_iou(confusion, present_only=True) == pytest.approx((3 / 4 + 4 / 5) / 2)


def test_predictions_are_renamed_for_the_largest_iou():
    rng = np.random.RandomState(0)
    for n in (1, 2, 3, 5, 6):
        for _ in range(10):
            confusion = rng.randint(0, 20, (n, n))
            best = max(mean_iou(confusion[:, list(columns)]) for columns in permutations(range(n)))
            assert mean_iou(match_predictions(confusion)) == pytest.approx(best)


def worker(folder):
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    golden = load("dense_retrieval.npz")
    labels = patch_labels(golden_masks(golden), CLASSES, 4)
    features = golden_features(golden, labels)
    memory = PatchMemory(512, 16, CLASSES)
    for i in range(8):
        if (i < 7) == (rank == 0):  # 7 maps and 1
            memory.add(features[i].flatten(0, 1), labels[i].flatten(0, 1))
    torch.save(memory.vote(features[8 + 2 * rank:10 + 2 * rank].flatten(0, 2)), f"{folder}/{rank}.pth")
    leave_processes()


@pytest.mark.slow
def test_two_processes_vote_as_one(golden, tmp_path):
    run_ranks(worker, str(tmp_path))
    memory, queries = golden_memory(golden, torch.float16)
    ours = torch.cat([torch.load(tmp_path / f"{rank}.pth") for rank in range(2)])
    torch.testing.assert_close(ours, memory.vote(queries), rtol=0, atol=1e-6)
