"""The rotation's operators alone, beside a copy of the bytes that they move: the suite ``kernels``.

On a GPU these are the Triton kernels, on a CPU plain torch. ``of_copy`` is the speed in bytes over that of the copy.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpu_kernels import rotation_runs

from measure import Row, interleave, timings
from options import Options

# What each moves, in units of the input's bytes: a copy reads and writes one.
MOVED = {"copy": 2, "rotate": 2, "rotate from generators": 2, "rotate backward": 3}


def measure(options: Options) -> Iterator[Row]:
    b = options.sizes.block_size
    if options.quick:
        shapes = [(48, 64, b)]
    elif options.device.type == "cuda":
        shapes = [(8192, d, b) for d in (4096, 14336)] + [(8192, 4096, size) for size in (16, 64, 128)]
    else:
        shapes = [(4096, d, b) for d in (576, 1536)] + [(4096, 1536, size) for size in (16, 64, 128)]
    for tokens, d, size in shapes:
        group = f"{tokens} x {d}, b = {size}"
        if not options.wanted(group):
            continue
        torch.manual_seed(options.seed)
        runs = rotation_runs(options.device, options.dtype, tokens, d, size)
        samples = interleave(runs, options.device, calibrate=True, title=group, **options.effort)
        for name, moved in MOVED.items():
            row = {"group": group, "method": name, "dtype": options.dtype_name}
            row |= {"tokens": tokens, "in": d, "block_size": size}
            row |= timings(samples, name, {"over_copy": "copy"})
            yield row | {"of_copy": round(moved / MOVED["copy"] / row["over_copy"], 3)}
