"""What libraries raise when memory runs out, and errors that only look like it."""

from __future__ import annotations

import torch

from oomguard import LadderExhaustedError

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 12.75 MiB is free. Process 4711 has 77.00 GiB memory in use. Including non-PyTorch "
    "memory, this process has 2.10 GiB memory in use. {allowed}Of the allocated memory 1.50 GiB is "
    "allocated by PyTorch, with 24.00 MiB allocated in private pools (e.g., CUDA Graphs), and "
    "100.00 MiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is "
    "large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See "
    "documentation for Memory Management  (https://pytorch.org/docs/stable/notes/cuda.html)"
)
OUT_OF_MEMORY = {
    "cuda": torch.OutOfMemoryError(CUDA.format(allowed="")),
    "huge": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than 1EB memory."),
    "bare": torch.OutOfMemoryError(),
    "raised anew": RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "python": MemoryError(),
    "numpy": MemoryError("Unable to allocate 7.28 TiB for an array with shape (10**12,)"),
    "driver": torch.AcceleratorError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some "
        "other API call, so the stacktrace below might be incorrect."
    ),
    "cublas": RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "nccl": RuntimeError(
        "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1970, unhandled cuda "
        "error, NCCL version 2.27.3\nncclUnhandledCudaError: Call to CUDA function failed.\n"
        "Last error:\nCuda failure 2 'out of memory'"
    ),
    "nccl's own": RuntimeError("NCCL WARN Failed to CUDA calloc 4194304 bytes"),
    "bitsandbytes": RuntimeError(
        "Error out of memory at line 380 in file /src/csrc/pythonInterface.cpp"
    ),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 8000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "cpu on windows": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you "
        "tried to allocate 1536 bytes."
    ),
    "mps": RuntimeError(
        "MPS backend out of memory (MPS allocated: 8.00 GiB, other allocations: 1.00 GiB, max "
        "allowed: 9.07 GiB). Tried to allocate 256.00 MiB on private pool."
    ),
    "xpu": RuntimeError(
        "XPU out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 16.00 GiB."
    ),
    "level zero": RuntimeError("level_zero backend failed: UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"),
    "hip": RuntimeError("HIP out of memory. Tried to allocate 1.50 GiB."),
    "hip driver": RuntimeError("HIP error: out of memory"),
    "npu": RuntimeError(
        "NPU out of memory. Tried to allocate 52.00 MiB (NPU 0; 60.96 GiB total capacity; "
        "59.36 GiB already allocated; 10.00 MiB free; 59.90 GiB reserved in total by PyTorch)"
    ),
    "hpu": RuntimeError(
        "[Rank:0] FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed for size::268435456 (256)MB"
    ),
}
OTHER = {
    "triton": RuntimeError(
        "out of resource: shared memory, Required: 147456, Hardware limit: 101376. Reducing block "
        "sizes or `num_stages` may help."
    ),
    "inductor": RuntimeError(
        "No valid triton configs. OutOfMemoryError: out of resource: triton_red_fused_0 Required: "
        "264192 Hardware limit: 232448 Reducing block sizes or `num_stages` may help."
    ),
    "illegal access": torch.AcceleratorError(
        "CUDA error: an illegal memory access was encountered"
    ),
    "assert": torch.AcceleratorError("CUDA error: device-side assert triggered"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    "nccl": RuntimeError("NCCL error: unhandled system error, NCCL version 2.27.3"),
    "hpu is taken": RuntimeError("synStatus=8 [Device not found] Device acquire failed."),
    "host": OSError(12, "Cannot allocate memory"),
    "value": ValueError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    "shapes": RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"),
    "the user's": RuntimeError("the queue is out of memory slots"),
    "exhausted": LadderExhaustedError(CUDA.format(allowed="")),
    "interrupt": KeyboardInterrupt(),
}
