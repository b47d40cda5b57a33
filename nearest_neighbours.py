"""Exact nearest neighbours by cosine, in chunks: any number of queries against a bank in half precision."""
import torch
import torch.nn.functional as F

QUERY_ROWS, BANK_ROWS = 1024, 32768  # of one product: 128 MiB of float32 cosines
GROUP = 64  # columns whose maximum is taken before the top-k
MARGIN = 16  # candidates more than asked for, where products are rounded to half precision


def nearest(queries: torch.Tensor, bank: torch.Tensor, k: int, query_rows: int = QUERY_ROWS,
            bank_rows: int = BANK_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """The k rows of a bank with the largest cosine to each query, best first; the first row where two are equal.

    Products are computed in float32 on a CPU and in the bank's type on a GPU. The cosines of what is found are computed
    once more in float32, row by row, so that the chunks do not change them.

    Args:
        queries: [Q, D], of unit length.
        bank: [M, D], of unit length, float32 or half precision.
        k: at most M are returned.
        query_rows, bank_rows: rows of a chunk; a product takes 4 · query_rows · bank_rows bytes.

    Returns:
        Cosines, float32 [Q, k], and row numbers [Q, k].
    """
    k = min(k, len(bank))
    found = [_nearest_of_chunk(chunk, bank, k, bank_rows) for chunk in queries.split(query_rows)]
    if not found:
        return queries.new_zeros(0, k), torch.zeros(0, k, dtype=torch.long, device=queries.device)
    return torch.cat([cosines for cosines, _ in found]), torch.cat([rows for _, rows in found])


def _nearest_of_chunk(queries: torch.Tensor, bank: torch.Tensor, k: int,
                      bank_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = bank.dtype if bank.is_cuda else torch.float32
    wanted = min(k + (0 if dtype == torch.float32 else MARGIN), len(bank))
    rounded, values, rows = queries.to(dtype), None, None
    for start in range(0, len(bank), bank_rows):
        products = rounded @ bank[start:start + bank_rows].to(dtype).T
        new_values, new_rows = top_k(products, min(wanted, products.shape[1]))
        new_rows += start
        if values is not None:
            new_values, new_rows = torch.cat([values, new_values], 1), torch.cat([rows, new_rows], 1)
        values, best = new_values.topk(min(wanted, new_values.shape[1]), dim=1)
        rows = new_rows.gather(1, best)
    rows = rows.sort(dim=1).values  # with a stable sort by cosine: of equal ones, the first row
    cosines = (bank[rows].float() * queries.float()[:, None]).sum(-1)
    cosines, order = cosines.sort(dim=1, descending=True, stable=True)
    return cosines[:, :k], rows.gather(1, order)[:, :k]


def top_k(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.topk of rows [Q, M], in any order.

    The k largest values lie in the k groups of columns with the largest maxima; only those are searched.
    """
    columns = values.shape[1]
    if columns < 4 * k * GROUP:
        return values.topk(k, dim=1, sorted=False)
    if columns % GROUP:
        values = F.pad(values, (0, -columns % GROUP), value=-torch.inf)
    groups = values.unflatten(1, (-1, GROUP))
    best = groups.amax(-1).topk(k, dim=1, sorted=False).indices
    found, place = groups.gather(1, best[..., None].expand(-1, -1, GROUP)).flatten(1).topk(k, dim=1, sorted=False)
    return found, best.gather(1, place // GROUP) * GROUP + place % GROUP
