"""What a rank holds while models are loaded: the weights that it will keep, and what is on its way to them."""

from __future__ import annotations

from collections import Counter

from engine.shapes import Bytes, Home

WEIGHTS, QUANTIZATION, ON_ITS_WAY = "weights", "quantization", "being loaded"
PACKING_BYTES = 20
"""bitsandbytes takes about so many for each number of a weight that it packs."""


def of_home(home: Home, resting: Bytes, cut: bool) -> Bytes:
    """While this home is loaded: a bound, for what is small is whole only once DeepSpeed has begun.

    Rank 0 reads the files tensor by tensor and sends each rank its part. A quantized base is packed whole on every rank
    before ZeRO-3 cuts it.

    Args:
        resting: what it will hold between phases.
        cut: by ZeRO-3.
    """
    parts = (WEIGHTS, QUANTIZATION)
    found = Bytes(*(Counter({part: of[part] for part in parts if of[part]}) for of in vars(resting).values()))
    packed = [weight for weight in home.weights if weight.constants]
    numbers = {1: 1, 2: 4, 4: 8}  # of a packed weight, in each element of the base's type
    if packed:
        way = PACKING_BYTES * max(weight.elements * numbers[weight.itemsize] for weight in packed)
        way += sum(weight.nbytes for weight in packed) if cut else 0
    else:
        way = max(weight.nbytes for weight in home.weights) if cut else 0
    return found + Bytes(Counter({ON_ITS_WAY: way} if way else {}))


def one_after_another(homes: dict[str, Bytes]) -> dict[str, Bytes]:
    """All homes, of which one is on its way at a time: the largest."""
    last = max(homes, key=lambda name: homes[name].device[ON_ITS_WAY])
    for name, found in homes.items():
        if name != last:
            del found.device[ON_ITS_WAY]
    return homes
