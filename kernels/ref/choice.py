"""The largest of many numbers, in an order that no machine's sort decides."""

from __future__ import annotations

import torch
from torch import Tensor


def largest(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """See `qwenrun.kernels.ops.largest`."""
    count = min(count, len(x))
    # What is no number is the largest, as a sort has it.
    kept = x.topk(count).values[-1]
    above = (x > kept) | x.isnan() if not kept.isnan() else x.isnan()
    ids = above.nonzero()[:, 0]
    if len(ids) < count:
        ids = torch.cat([ids, (x == kept).nonzero()[: count - len(ids), 0]])
    ids = ids.sort().values[:count]
    values, order = x[ids].sort(descending=True, stable=True)
    return values, ids[order]
