"""weft allocator: a classic cudaMalloc pool, for memory that RDMA can register.

with weft_cudamalloc.pool() as held:
    weights = torch.empty(..., device="cuda")
assert held.active, held.reason
"""

from __future__ import annotations

from weft_cudamalloc.pools import CudaMallocAllocator, Pool, factory, inactive_reason, pool
from weft_cudamalloc.runtime import CudaRuntime, load_runtime

__all__ = [
    "CudaMallocAllocator",
    "CudaRuntime",
    "Pool",
    "factory",
    "inactive_reason",
    "load_runtime",
    "pool",
]
