"""The command lines of the examples."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _data import DEFAULT_TASK
from _methods import OFT, Full, LoRA
from _model import SMOLLM2, ModelError, default_cache, smollm2_folder

QUICK = {"steps": 10, "batch_size": 4, "held_out": 8}  # enough to see that everything runs


def positive(kind: type) -> Callable[[str], Any]:
    """An argparse type: a number above zero."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above zero")
        return value

    parse.__name__ = kind.__name__
    return parse


def json_object(text: str) -> dict[str, Any]:
    """An argparse type: a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, found {type(value).__name__}")
    return value


def parse_model(description: str) -> str | Path:
    """The only argument of the short scripts: which model to train, a folder or a name on the hub."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help=f"a folder or a hub name (default: {SMOLLM2}, offline)")
    try:
        return parser.parse_args().model or smollm2_folder(default_cache())
    except ModelError as error:
        parser.error(str(error))


def parse_arguments(description: str, argv: list[str] | None) -> argparse.Namespace:
    """The command line; what contradicts itself is refused here, before anything is loaded."""
    parser = argparse.ArgumentParser(
        prog="finetune.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what to train on")
    what.add_argument("--model", help=f"folder or hub name (default: {SMOLLM2}, offline)")
    what.add_argument(
        "--data",
        help="JSONL file of rows with a question (or prompt) and an answer, or the name of a "
        "dataset on the Hugging Face Hub, name or name:configuration",
    )
    what.add_argument("--task", default=DEFAULT_TASK, help="reasoning-gym task to generate questions of (%(default)s)")
    what.add_argument(
        "--task-config",
        type=json_object,
        metavar="JSON",
        help="its settings, such as '{\"max_terms\": 3}' (default: sums of two numbers below a hundred; for another "
        "task its own default)",
    )
    what.add_argument(
        "--prompt",
        choices=("plain", "chat"),
        default="plain",
        help="the question as it is, or in the model's chat template (plain)",
    )
    what.add_argument("--examples", type=positive(int), default=4000, help="questions to generate (4000)")
    what.add_argument("--held-out", type=positive(int), default=200, help="questions kept for the test (200)")

    how = parser.add_argument_group("how to train")
    how.add_argument("--method", choices=("oft", "lora", "full"), default="oft", help="(oft)")
    how.add_argument("--compare", action="store_true", help="train LoRA on the same data as well, and compare")
    how.add_argument(
        "--quantize",
        choices=("none", "nf4", "int8"),
        default="none",
        help="hold the frozen base in 4 or 8 bits with bitsandbytes (none)",
    )
    how.add_argument("--block-size", type=positive(int), default=32, help="OFT: size of the rotated blocks (32)")
    how.add_argument("--rank", type=positive(int), default=16, help="LoRA: rank (16)")
    how.add_argument(
        "--targets",
        nargs="+",
        default=["all-linear"],
        metavar="NAME",
        help="layers to adapt: all-linear, names such as q_proj v_proj, or one regular expression for "
        "the whole path (all-linear)",
    )
    how.add_argument(
        "--lr",
        type=positive(float),
        help=f"learning rate (OFT {OFT.lr:g}, LoRA {LoRA.lr:g}, "
        f"full {Full.lr:g}); with --compare it is the first method's",
    )
    how.add_argument("--steps", type=positive(int), help="optimizer steps (200, or as many as --seconds allow)")
    how.add_argument("--seconds", type=positive(float), help="stop training after this time")
    how.add_argument("--batch-size", type=positive(int), default=8, help="(8)")
    how.add_argument("--seed", type=int, default=0, help="(0)")

    where = parser.add_argument_group("where")
    where.add_argument("--device", help="cpu, cuda, cuda:1 … (cuda if there is one)")
    where.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base (float32)")
    where.add_argument("--out", type=Path, default=Path("finetune-out"), help="folder for the results (finetune-out)")
    where.add_argument(
        "--cache",
        type=Path,
        help="folder for the converted default model ($OFTV2_CACHE, or oftv2 in $XDG_CACHE_HOME or ~/.cache)",
    )
    where.add_argument("--quick", action="store_true", help="a few steps and questions, to see that it all runs")
    args = parser.parse_args(argv)

    if args.method == "full" and args.quantize != "none":
        parser.error("--method full trains every weight, and quantized weights cannot be trained: use oft or lora")
    if args.compare and args.method == "lora":
        parser.error("--compare sets LoRA beside another method: use it with --method oft or full")
    if args.quick:
        for name, value in QUICK.items():
            if getattr(args, name) == parser.get_default(name):
                setattr(args, name, value)
    if args.steps is None and args.seconds is None:
        args.steps = 200
    try:
        args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: this PyTorch cannot use it: {str(error).splitlines()[0]}")
    return args
