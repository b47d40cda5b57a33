"""The weighted k-NN vote: the reference's figures, whatever the chunks, types and processes."""
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from forked import free_port
from golden_rules import load, rand

from selfpatch.distributed.collectives import gather_rows
from selfpatch.distributed.processes import leave_processes
from selfpatch.evaluation import knn
from selfpatch.evaluation.knn import (
    BANK_ROWS,
    QUERY_ROWS,
    Accuracy,
    bank_dtype,
    class_ranks,
    classify,
    nearest,
    neighbours,
    search,
)


def golden_data(salt):
    """Bank, its classes, queries and theirs, by golden/README.md."""
    means = rand(90, 7, 32, salt=salt)
    parts = []
    for seed, count in ((91, 300), (92, 200)):
        labels = torch.arange(count) * 5 % 7
        parts += [F.normalize(means[labels] + 1.6 * rand(seed, count, 32, salt=salt), dim=1), labels]
    return parts


@pytest.mark.parametrize("block, chunks", [(4096, {}), (50, {"query_rows": 7, "bank_rows": 11})])
def test_golden_knn(block, chunks, monkeypatch):
    monkeypatch.setattr(knn, "BLOCK", block)
    golden = load("knn.npz")
    bank, labels, queries, truth = golden_data(golden["salt"])
    ks = [int(name[1:]) for name in golden if name.startswith("k")]
    ours = classify(queries, truth, bank, labels, 7, ks, **chunks)
    assert {k: [round(value, 4) for value in ours[k]] for k in ks} == {k: golden[f"k{k}"].tolist() for k in ks}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_search_is_the_plain_product_and_top_k(dtype):
    queries, bank = (F.normalize(torch.randn(n, 24), dim=1) for n in (23, 150))
    bank = bank.to(dtype)
    expected = (queries @ bank.float().T).topk(60, dim=1)
    for chunks in ({}, {"query_rows": 5, "bank_rows": 40}, {"bank_rows": 7}, {"bank_rows": 149}):
        products, rows = search(queries, bank, 60, **chunks)
        torch.testing.assert_close(products, expected.values)
        assert torch.equal(rows, expected.indices)
    assert search(queries, bank, 500)[0].shape == (23, 150)


def tied_data():
    """A bank whose rows have up to eight copies of other classes, and queries."""
    bank, queries = (F.normalize(torch.randn(n, 24, generator=torch.Generator().manual_seed(n)), dim=1)
                     for n in (12, 40))
    return queries, bank.repeat(8, 1)[torch.randperm(96, generator=torch.Generator().manual_seed(0))], torch.arange(96)


def test_ties_do_not_depend_on_chunks():
    queries, bank, labels = tied_data()
    expected = neighbours(queries, bank, labels, 20)
    tied = expected[0][:, 1:] == expected[0][:, :-1]
    assert tied.any() and (expected[1].diff(dim=1)[tied] > 0).all()
    for chunks in ({"query_rows": 7, "bank_rows": 11}, {"bank_rows": 1}, {"query_rows": 1}):
        for ours, theirs in zip(neighbours(queries, bank, labels, 20, **chunks), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_votes_are_weighted():
    cosines = torch.tensor([[0.9, 0.8, 0.79, -1.0]])
    classes = torch.tensor([[2, 1, 1, 0]])
    # one near neighbour against two farther ones: e^(0.9/T) against e^(0.8/T) + e^(0.79/T)
    for temperature, order in ((0.07, [2, 1, 0]), (1.0, [1, 2, 0])):
        ranks = [class_ranks(cosines, classes, torch.tensor([c]), 4, temperature).item() for c in (0, 1, 2, 3)]
        assert [ranks.index(place) for place in range(3)] == order and ranks[3] == 3


def test_k_above_the_bank_is_the_whole_bank():
    """With nine classes, so that the first five are not all."""
    bank, queries = (F.normalize(torch.randn(n, 8), dim=1) for n in (18, 40))
    labels, truth = torch.arange(18) % 9, torch.arange(40) % 9
    found = classify(queries, truth, bank, labels, 9, (3, 20, 200))
    assert list(found) == [3, 18]
    votes = (queries @ bank.T / 0.07).exp() @ F.one_hot(labels, 9).float()
    first = votes.topk(5, dim=1).indices == truth[:, None]
    expected = [100 * hits.float().mean().item() for hits in (first[:, 0], first.any(1))]
    assert list(found[18]) == pytest.approx(expected)
    assert found[18].top1 < found[18].top5 < 100 and found[3].top5 < found[18].top5


def test_imagenets_bank_fits_two_gigabytes():
    assert bank_dtype(1_281_167, 384) == torch.float16 and bank_dtype(10_000, 384) == torch.float32
    assert 1_281_167 * (bank_dtype(1_281_167, 384).itemsize * 384 + 8) < 2e9  # features, and classes as 8-byte integers
    # and what a search takes besides: the products, and the float32 copy of a chunk
    assert 4 * QUERY_ROWS * BANK_ROWS + 4 * 384 * BANK_ROWS < 0.4e9


def test_half_precision_changes_hardly_anything():
    bank, labels, queries, truth = golden_data(0)
    exact, half = (classify(queries, truth, part, labels, 7, (1, 20)) for part in (bank, bank.half()))
    for k in exact:
        assert isinstance(half[k], Accuracy) and abs(exact[k].top1 - half[k].top1) <= 0.5


def one_process(queries, bank, labels, k):
    cosines, rows = nearest(queries, bank, k)
    return cosines, labels[rows]


def share_of_three(rank, port, queries, truth, bank, labels, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    queries, truth = gather_rows(queries[rank::3]), gather_rows(truth[rank::3])
    found = classify(queries, truth, bank[rank::3], labels[rank::3], 7, (1, 20, 200))
    tied = tied_data()
    (cosines, classes), expected = neighbours(tied[0], tied[1][rank::3], tied[2][rank::3], 20), one_process(*tied, 20)
    torch.testing.assert_close(cosines, expected[0])
    assert torch.equal(classes, expected[1])
    if rank == 2:
        torch.save({k: list(accuracy) for k, accuracy in found.items()}, path)
    leave_processes()


@pytest.mark.long
def test_three_processes_share_a_bank_in_half_precision(tmp_path):
    """A share has 33 or 34 rows, fewer than k."""
    bank, labels, queries, truth = golden_data(0)
    bank, queries = bank[:100].half(), queries[:50].half()
    labels, truth = labels[:100], truth[:50]
    torch.multiprocessing.spawn(share_of_three, (free_port(), queries, truth, bank, labels, tmp_path / "found.pth"), 3)
    expected = classify(queries, truth, bank, labels, 7, (1, 20, 200))
    assert torch.load(tmp_path / "found.pth") == {k: list(accuracy) for k, accuracy in expected.items()}
