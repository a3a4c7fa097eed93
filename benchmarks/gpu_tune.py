"""Times every setting of the kernels on a GPU, and says which are fastest: where the tables in kernels/ come from.

    make gpu-tune                                # or: python benchmarks/gpu_tune.py
    python benchmarks/gpu_tune.py --only 'rotate backward' --minutes 3
    TRITON_INTERPRET=1 python benchmarks/gpu_tune.py --device cpu   # tiny sizes: checks this script, not the speed

It needs torch and triton, nothing else, and no installation. Settings are compiled by all processors first, checked
against what is shipped, and timed in turns: all of them a few times, the best of them again. The results file is
written after every kernel, so one that is stopped keeps what it found; what it says goes into the tables by hand.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from checkout import ROOT, make_importable

make_importable()

import torch  # noqa: E402  (after the package can be found)
from provenance import environment  # noqa: E402
from torch import Tensor  # noqa: E402
from tuning import Candidate, Launch, Sizes, launches  # noqa: E402

from measure import interleave, relative_error  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
REAL, TINY = Sizes(8192, 4096, 4096), Sizes(32, 256, 128)
_BEST = 6  # that are timed again
_TRIED_ON_CPU = 3  # candidates of each launch, where only the script is checked


def compiled(name: str, index: int, capability: int) -> str:
    """Compiles a candidate of a launch into Triton's cache; what is wrong with it, or nothing."""
    from kernel_launches import compile_launches

    launch = next(launch for launch in launches(REAL) if launch.name == name)
    try:
        with launch.candidates[index].applied():
            compile_launches(lambda device: launch.prepare(device)(0), capability)
    except Exception as error:  # whatever the compiler raises is this candidate's affair
        return type(error).__name__
    return ""


def usable(launch: Launch, device: torch.device, pool: ProcessPoolExecutor | None) -> tuple[list[Candidate], Any]:
    """The candidates that compile and compute what the first one does, and what runs the launch."""
    candidates = launch.candidates
    if pool is None:
        candidates = [candidates[0], *candidates[1 :: -(-len(candidates) // _TRIED_ON_CPU)]]
        problems = [""] * len(candidates)
    else:
        major, minor = torch.cuda.get_device_capability(device)
        work = functools.partial(compiled, launch.name, capability=10 * major + minor)
        problems = list(pool.map(work, range(len(candidates)), chunksize=4))
    run = launch.prepare(device)
    expected = flat(run(0))
    found = []
    for place, candidate in enumerate(candidates):
        if not problems[place]:
            problems[place] = wrong(candidate, run, expected)
        if not problems[place]:
            found.append(candidate)
    if problems[0]:
        raise SystemExit(f"{launch.name}: what is shipped fails: {problems[0]}")
    for problem, count in collections.Counter(filter(None, problems)).items():
        print(f"{launch.name}: {count} of {len(candidates)} settings left out: {problem}", file=sys.stderr)
    return found, run


def wrong(candidate: Candidate, run: Any, expected: Tensor) -> str:
    """Why a candidate cannot be used, or nothing."""
    try:
        with candidate.applied():
            error = relative_error(flat(run(0)), expected)
    except Exception as refusal:  # shared memory, registers, sizes that a launcher refuses
        return type(refusal).__name__
    return "" if error < 1e-2 else "another result"


def flat(outputs: Any) -> Tensor:
    """All outputs one after the other, in float32."""
    tensors = [outputs] if isinstance(outputs, Tensor) else outputs
    return torch.cat([tensor.reshape(-1).float() for tensor in tensors if tensor is not None])


def timed(candidates: list[Candidate], run: Any, device: torch.device, rounds: int, title: str) -> list[float]:
    """Median microseconds of each."""

    def call(candidate: Candidate, round_: int) -> None:
        with candidate.applied():
            run(round_)

    runs = {str(place): functools.partial(call, candidate) for place, candidate in enumerate(candidates)}
    samples = interleave(runs, device, rounds=rounds, warmup=1, title=title)
    return [1e6 * statistics.median(samples[name]) for name in runs]


def tune(launch: Launch, device: torch.device, pool: ProcessPoolExecutor | None) -> dict[str, object]:
    """The shipped settings' time and the best ones, each with its own."""
    candidates, run = usable(launch, device, pool)
    times = timed(candidates, run, device, 5 if pool else 1, launch.name)
    ranked = sorted(range(1, len(candidates)), key=times.__getitem__)[:_BEST]
    finals = [candidates[0], *(candidates[place] for place in ranked)]
    shipped, *others = timed(finals, run, device, 41 if pool else 1, launch.name)
    best = sorted(zip(others, (c.settings for c in finals[1:]), strict=True), key=lambda pair: pair[0])
    return {
        "kernel": launch.name,
        "tried": len(candidates),
        "shipped_us": round(shipped, 2),
        "shipped_tb_per_s": round(launch.moved / shipped / 1e6, 3),
        "best": [{"us": round(us, 2), "over_shipped": round(us / shipped, 3), **settings} for us, settings in best],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--only", default="", metavar="REGEX", help="kernels whose names match")
    parser.add_argument("--minutes", type=float, default=9, help="begin no kernel after this time (default: 9)")
    parser.add_argument("--out", type=Path, help="write this file instead of results/gpu-tuning-<device>.json")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --device cpu runs the script on tiny sizes, to check the script")
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("without a CUDA device the kernels run in Triton's interpreter: set TRITON_INTERPRET=1")
    device, start = torch.device(args.device), time.perf_counter()
    wanted = [launch for launch in launches(REAL if on_gpu else TINY) if re.search(args.only, launch.name)]
    if not wanted:
        raise SystemExit(f"--only {args.only!r} matches no kernel")
    about = environment(device)
    out = args.out or RESULTS / f"gpu-tuning-{str(about['device']).replace(' ', '-').lower()}.json"
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(os.cpu_count(), spawn) if on_gpu else None
    results: list[dict[str, object]] = []
    for launch in wanted:
        if time.perf_counter() - start > 60 * args.minutes:
            print(f"{len(wanted) - len(results)} kernels were not tried in {args.minutes:g} minutes", file=sys.stderr)
            break
        results.append(tune(launch, device, pool))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": about, "kernels": results}, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(results[-1]), flush=True)
    if pool is not None:
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
