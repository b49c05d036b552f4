"""The largest of many numbers, in an order that no machine's sort decides."""

from __future__ import annotations

import torch
from torch import Tensor


def largest(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """See `qwenrun.kernels.ops.largest`."""
    count = min(count, len(x))
    if count == 1:
        ids = x.argmax()[None]  # of equal ones the first
        return x[ids], ids
    top = x.topk(count).values
    if top[0].isnan():
        ids = x.isnan().nonzero()[:count, 0]
        if len(ids) < count:
            numbers = x.masked_fill(x.isnan(), -torch.inf)
            ids = torch.cat([ids, largest(numbers, count - len(ids))[1]])
        return x[ids], ids
    ids = (x >= top[-1]).nonzero()[:, 0]
    if len(ids) > count:  # more have the last one's value than there is room for
        above = (x > top[-1]).nonzero()[:, 0]
        ids = torch.cat([above, (x == top[-1]).nonzero()[: count - len(above), 0]]).sort().values
    values, order = x[ids].sort(descending=True, stable=True)
    return values, ids[order]
