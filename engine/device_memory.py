"""What a device still has room for: free bytes, and what a KV cache takes."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch
from transformers import PretrainedConfig

CGROUPS = (
    ("", "/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("memory", "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Control groups of version 2, which name no controller, and of version 1: root, limit, usage, what of it is cache."""


def free_bytes(device: torch.device, local_ranks: int) -> int:
    """Bytes that this rank can still allocate on its device; a CPU's are shared by the ranks of the host."""
    if device.type == "cuda":
        # What PyTorch's allocator keeps for itself but nobody uses is free for us.
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return min(psutil.virtual_memory().available, _cgroup_room()) // local_ranks


def kv_cache_bytes(config: PretrainedConfig, rows: int, columns: int, dtype: torch.dtype) -> int:
    """Of a cache that is full to the last column: layers x rows x columns x 2 x KV heads x head width x bytes.

    An upper bound: sliding windows and recurrent layers take less.

    Args:
        config: of a causal model.
        columns: tokens of a row, prompt and response.
    """
    sizes = {name: value for name, value in _flat(config).items() if isinstance(value, int)}
    if "kv_lora_rank" in sizes:  # multi-head latent attention: a latent and a rotated key that all heads share
        width = sizes["kv_lora_rank"] + sizes["qk_rope_head_dim"]
    else:
        heads = sizes.get("num_key_value_heads") or sizes["num_attention_heads"]
        width = 2 * heads * (sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"])
    return sizes["num_hidden_layers"] * rows * columns * width * dtype.itemsize


def _flat(config: PretrainedConfig) -> dict:
    """The config's values by the names that families agree on."""
    text = config.get_text_config()
    return {
        **vars(text),
        **{name: getattr(text, own) for name, own in text.attribute_map.items() if hasattr(text, own)},
    }


def _cgroup_room(listing: Path = Path("/proc/self/cgroup")) -> float:
    """Bytes left under the limits of this process's control group and those around it; infinite without any."""
    try:
        lines = listing.read_text().splitlines()
    except OSError:  # not Linux
        return float("inf")
    room = float("inf")
    for _, controllers, path in (line.split(":", 2) for line in lines):
        for controller, root, *names in CGROUPS:
            if controller in controllers.split(","):
                # Every limit on the way up holds. In a container the path can be the host's, and the root all there is.
                folder = Path(root, path.lstrip("/"))
                inside = [parent for parent in (folder, *folder.parents) if parent.is_relative_to(root)]
                room = min(room, *(_room_of(parent, *names) for parent in inside))
    return room


def _room_of(folder: Path, limit: str, usage: str, reclaimable: str) -> float:
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        cache = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return float("inf")
    return float("inf") if most == "max" else max(0, int(most) - used + int(cache.get(reclaimable, 0)))
