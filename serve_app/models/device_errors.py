"""Which errors of torch mean that the memory of the device is full."""

import torch

_SIGNS = (
    "DefaultCPUAllocator",
    # cuBLAS and cuDNN allocate beside torch's own pool and have error codes for it: CUBLAS_STATUS_ALLOC_FAILED,
    # CUDNN_STATUS_ALLOC_FAILED and, since cuDNN 9, CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED.
    "ALLOC_FAILED",
    "ALLOCATION_FAILED",
    # What CUDA calls answer that allocate without torch's pool. Unlike its other errors it leaves the device usable.
    "CUDA error: out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is a failed allocation, after which the device works on; ask before any test for its type."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
