"""Environment of replica processes. Imports no ray: whoever starts Ray sets this first, for Ray reads it on import."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def environment(threads: int) -> dict[str, str]:
    """Environment of a replica process.

    OpenMP threads that spin while they wait turned a step of 80 ms into 2,550 ms beside a busy process: PASSIVE puts
    them to sleep. Hub look-ups and remote code are off: models come from the catalogue only.
    """
    variables = dict.fromkeys(THREAD_VARIABLES, str(threads))
    return variables | {
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "DIFFUSERS_DISABLE_REMOTE_CODE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


KEEP_HEAP = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
"""For engine processes on a CPU: glibc keeps freed memory instead of asking the kernel for zeroed pages anew.

Measured on one thread with a UNet of 32 to 64 channels, 16 rows at 512x512: 48 ms a row and 79,000 page faults a
forward without, 39 ms and none with it. Both are needed: setting one switches glibc's own adaptation off.
"""
