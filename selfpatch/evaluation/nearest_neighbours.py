"""Exact nearest neighbours in chunks: any number of queries against a bank in half precision."""
import torch
import torch.nn.functional as F

QUERY_ROWS, BANK_ROWS = 256, 131_072  # of one product: 128 MiB of float32 cosines
SPARE = 8  # rows that nearest compares beyond those asked for
ROUNDING = 2e-6  # twice what the order of sums changes in a product of two vectors of unit length
REFINED_QUERIES = 8  # whose rows nearest gathers at a time on a CPU, so that they stay in its cache


@torch.inference_mode()
def search(queries: torch.Tensor, bank: torch.Tensor, k: int, query_rows: int = QUERY_ROWS,
           bank_rows: int = BANK_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """The k rows of a bank with the largest products with each query, largest first.

    Products are computed in float32, whatever the bank's type; chunks of the bank are converted once.

    Args:
        queries: [Q, D], float32.
        bank: [M, D], float32 or half precision.
        k: at most M are returned.
        query_rows, bank_rows: rows of a chunk; a product takes 4 · query_rows · bank_rows bytes.

    Returns:
        Products, float32 [Q, k], and row numbers [Q, k].
    """
    k = min(k, len(bank))
    best = queries.new_full((len(queries), k), -torch.inf)
    rows = torch.zeros(len(queries), k, dtype=torch.long, device=queries.device)
    # one buffer for all products: returning such memory to the system and getting it again costs a sixth of the time
    buffer = queries.new_empty(min(query_rows, len(queries)) * min(bank_rows, len(bank)))
    for start in range(0, len(bank), bank_rows):
        part = bank[start:start + bank_rows].float().T
        for first in range(0, len(queries), query_rows):
            chunk = slice(first, first + query_rows)
            q = queries[chunk]
            products = torch.mm(q, part, out=buffer[:len(q) * part.shape[1]].view(len(q), -1))
            values, columns = products.topk(min(k, part.shape[1]), dim=1)
            if start:
                values = torch.cat([best[chunk], values], dim=1)
                columns = torch.cat([rows[chunk], columns + start], dim=1)
                values, order = values.topk(k, dim=1)
                columns = columns.gather(1, order)
            best[chunk, :values.shape[1]], rows[chunk, :values.shape[1]] = values, columns
    return best, rows


def nearest(queries: torch.Tensor, bank: torch.Tensor, k: int, query_rows: int = QUERY_ROWS,
            bank_rows: int = BANK_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """search(), with results that do not depend on the chunks; of equal products, the first row comes first.

    A product of matrices adds in an order that depends on their sizes. Here the rows that are found, and SPARE more,
    are multiplied once more, one by one, and ordered by that. On a CPU products and rows are then the same to the bit
    for any chunks, unless more than SPARE rows beyond the k-th are within rounding of it (1e-6 for vectors of unit
    length), such as copies of one row: which of those are found is up to the chunks.
    """
    rows = search(queries, bank, k + SPARE, query_rows, bank_rows)[1].sort(dim=1).values
    step = REFINED_QUERIES if queries.device.type == "cpu" else query_rows
    products = [(bank[r].float() * q[:, None]).sum(-1)
                for q, r in zip(queries.split(step), rows.split(step), strict=True)]
    values, order = torch.cat(products).sort(dim=1, descending=True, stable=True)
    return values[:, :k], rows.gather(1, order)[:, :k]


@torch.inference_mode()
def ordered_search(queries: torch.Tensor, bank: torch.Tensor, k: int, query_rows: int = QUERY_ROWS,
                   bank_rows: int = BANK_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """search(), with rows that do not depend on the chunks, as nearest's; of vectors of unit length.

    Products that no other comes close to are left as they are, so that it is nearly as fast as search.
    """
    values, rows = search(queries, bank, k + SPARE, query_rows, bank_rows)
    close = values.diff(dim=1).abs() < ROUNDING
    query, place = (F.pad(close, (0, 1)) | F.pad(close, (1, 0))).nonzero(as_tuple=True)
    for some in torch.arange(len(query), device=query.device).split(QUERY_ROWS * SPARE):
        one = query[some], place[some]
        values[one] = (bank[rows[one]].float() * queries[one[0]]).sum(-1)
    rows, order = rows.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values[:, :k], rows.gather(1, order)[:, :k]
