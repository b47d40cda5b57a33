"""Exact nearest neighbours in chunks: any number of queries against a bank in half precision."""
import torch
import torch.nn.functional as F

QUERY_ROWS, BANK_ROWS = 256, 131_072  # of one product: 128 MiB of float32 cosines
SPARE = 8  # further rows that nearest compares
ROUNDING = 2e-6  # twice the effect of the order of sums on a product of two vectors of unit length
REFINED_QUERIES = 8  # whose rows are gathered at a time on a CPU, to stay in its cache


@torch.inference_mode()
def search(queries: torch.Tensor, bank: torch.Tensor, k: int, query_rows: int = QUERY_ROWS,
           bank_rows: int = BANK_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """The k rows of a bank with the largest products with each query, largest first.

    Products are in float32 for any bank; each chunk of the bank is converted once.

    Args:
        queries: [Q, D], float32.
        bank: [M, D], float32 or half precision.
        k: at most M.
        query_rows, bank_rows: rows of a chunk; a product takes 4 · query_rows · bank_rows bytes.

    Returns:
        Products, float32 [Q, k], and row numbers [Q, k].
    """
    k = min(k, len(bank))
    best = queries.new_full((len(queries), k), -torch.inf)
    rows = torch.zeros(len(queries), k, dtype=torch.long, device=queries.device)
    # one buffer for all products: freeing and allocating such memory anew costs a sixth of the time
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
    """search() with results that do not depend on the chunks; equal products are ordered by row.

    A matrix product sums in an order that depends on its sizes. Hence the rows found, and SPARE more, are multiplied
    again one by one and ordered by the result. On a CPU, products and rows are then the same to the bit for any chunks,
    unless more than SPARE rows beyond the k-th equal it up to rounding (1e-6 for vectors of unit length), such as
    copies of one row: the chunks then decide which of these are found.
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
    """search() for vectors of unit length, with rows that do not depend on the chunks, like those of nearest().

    Only products close to another are computed again, so that it is nearly as fast as search().
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
