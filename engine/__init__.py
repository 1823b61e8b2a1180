"""Alternator: PPO-RLHF on DeepSpeed ZeRO."""

import os

# PyTorch reads it once, before its first large CPU tensor. Aligned to huge pages, what one micro-batch frees fits the
# next: glibc up to 2.37 leaves holes between tensors that are aligned to less (measured: a sixth of a rank's memory).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# When a rank dies, each connection to it would warn with a trace of 20 lines, and bury what the watchdog says.
if "ALTERNATOR_VERBOSE" not in os.environ:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
