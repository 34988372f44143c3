"""weft transport over NIXL: one-sided writes by UCX (RDMA, CUDA IPC, shared memory, TCP)."""
