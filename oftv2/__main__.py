"""``python -m oftv2``: look at adapters, convert them, merge them into models on disk, run PEFT's scripts faster."""

from __future__ import annotations

import argparse
import io
import os
import runpy
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint_merge import merge_checkpoint
from .conversion import LayerConversion, save_as_lora
from .errors import AdapterError
from .inspection import inspect_adapter
from .loading import load_adapter
from .peft_acceleration import VARIABLE, accelerate_all_if_asked
from .reading import read_adapter
from .saving import rewrite_adapter, save_adapter

_MAX_LAYERS = 12
DTYPES = ("float32", "bfloat16", "float16")

INSPECT_EXAMPLES = """examples:
  python -m oftv2 inspect adapter/
  python -m oftv2 inspect style.safetensors
"""
CONVERT_EXAMPLES = """examples:
  python -m oftv2 convert adapter/ for-peft/ --to peft
  python -m oftv2 convert from-peft/ ours/ --to oftv2
  python -m oftv2 convert adapter/ lora/ --to lora --base path/to/base --rank 64
  python -m oftv2 convert adapter/ lora/ --to lora --base path/to/base --tolerance 0.05

A LoRA is an approximation of a rotation: the error of each layer is printed, and the rank from which there is none.
"""
MERGE_EXAMPLES = """examples:
  python -m oftv2 merge path/to/base adapter/ merged/
  python -m oftv2 merge HuggingFaceTB/SmolLM2-135M adapter/ merged/ --dtype bfloat16

The base model is not loaded: a few MB of its weights are in memory at a time. OUT appears when it is
complete; run the same command again to go on with a merge that was stopped. The result is a plain model of
transformers'; from a base that bitsandbytes quantized, one of 16 bit.
"""
RUN_EXAMPLES = """examples:
  python -m oftv2 run train.py --model_name_or_path HuggingFaceTB/SmolLM2-135M
  accelerate launch -m oftv2 run train.py --output_dir out

It is the script as it stands, with every OFT layer that PEFT makes on this library's operators: see
oftv2.accelerate_peft. What cannot be reproduced exactly is left to PEFT, and a warning names it.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code.

    It is 0, 1 for an error or a closed pipe, 130 if it was stopped; a wrong usage exits with 2.
    """
    options = _parser().parse_args(arguments)
    if options.command is _run:
        return _run(options)  # warnings and errors are the script's own
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal or pipe that lacks a letter shows a question mark
        sys.stdout.reconfigure(errors="replace")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            options.command(options)
            sys.stdout.flush()
        except BrokenPipeError:  # who reads the output has had enough of it, as `| head` has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing to flush at the exit
            return 1
        except (AdapterError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m oftv2", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = _command(commands, "inspect", "what an adapter is, and how healthy", INSPECT_EXAMPLES)
    inspect.add_argument("adapter", help="a folder of oftv2's or PEFT's, or a single safetensors file")
    inspect.set_defaults(command=lambda options: print(inspect_adapter(options.adapter)))

    convert = _command(commands, "convert", "an adapter in another format", CONVERT_EXAMPLES)
    convert.add_argument("adapter", help="a folder of oftv2's or PEFT's, or a single safetensors file")
    convert.add_argument("out", type=Path, help="the folder to write")
    convert.add_argument("--to", required=True, choices=("peft", "oftv2", "lora"), help="the format")
    convert.add_argument(
        "--base", help="the base model, a folder or a name on the hub; by default, the one noted in ADAPTER"
    )
    size = convert.add_mutually_exclusive_group()
    size.add_argument("--rank", type=int, help="lora: the rank")
    size.add_argument("--tolerance", type=float, help="lora: the smallest rank with an error below this in every layer")
    convert.add_argument("--as-trained", action="store_true", help="PEFT before 0.18: the series it was trained with")
    convert.add_argument("--no-check-base", action="store_true", help="take the base model without comparing weights")
    convert.add_argument("--force", action="store_true", help="overwrite what is in OUT")
    convert.set_defaults(command=_convert, usage_error=convert.error)

    merge = _command(commands, "merge", "a model on disk with an adapter in its weights", MERGE_EXAMPLES)
    merge.add_argument("base", help="the base model in safetensors: a folder or a name on the hub")
    merge.add_argument("adapter", help="a folder of oftv2's or PEFT's, or a single safetensors file")
    merge.add_argument("out", type=Path, help="the folder to write")
    merge.add_argument("--dtype", choices=DTYPES, help="of the weights; by default, each as it is in BASE")
    merge.add_argument("--as-trained", action="store_true", help="PEFT before 0.18: the series it was trained with")
    merge.add_argument("--no-check-base", action="store_true", help="take the base model without comparing weights")
    merge.add_argument("--force", action="store_true", help="replace a model in OUT, once the new one is complete")
    merge.set_defaults(command=_merge)

    run = _command(commands, "run", "a script, with PEFT's OFT layers accelerated", RUN_EXAMPLES)
    run.add_argument("script", help="a Python file")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    run.set_defaults(command=_run)
    return parser


def _command(commands: Any, name: str, about: str, examples: str) -> argparse.ArgumentParser:
    kind = argparse.RawDescriptionHelpFormatter
    return commands.add_parser(name, help=about, description=about, epilog=examples, formatter_class=kind)


def _run(options: argparse.Namespace) -> int:
    """The script as ``python script.py`` would run it; ``OFTV2_ACCELERATE_PEFT=0`` leaves PEFT alone."""
    if not os.path.exists(options.script):
        print(f"error: there is no script {options.script}", file=sys.stderr)
        return 2
    if VARIABLE not in os.environ:  # importing oftv2 saw it otherwise
        os.environ[VARIABLE] = "1"
        accelerate_all_if_asked()
    sys.argv = [options.script, *options.arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(options.script))
    runpy.run_path(options.script, run_name="__main__")
    return 0


def _convert(options: argparse.Namespace) -> None:
    sized = options.rank is not None or options.tolerance is not None
    if sized != (options.to == "lora"):
        wanted = "needs --rank or --tolerance" if options.to == "lora" else "takes no --rank and no --tolerance"
        options.usage_error(f"--to {options.to} {wanted}")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())) and not options.force:
        raise AdapterError(f"{options.out} exists and is not empty: choose another folder, or use --force")
    if options.base is None and options.to != "oftv2":  # PEFT finds layers by the names of the model's modules
        options.base = read_adapter(options.adapter, as_trained=options.as_trained).base["name_or_path"]
        if not options.base:
            options.usage_error(f"--to {options.to} needs --base: {options.adapter} does not note its base model")
        print(f"base model, as noted in the adapter: {options.base}", file=sys.stderr)
    if options.base is None:
        rewrite_adapter(read_adapter(options.adapter, as_trained=options.as_trained), options.out)
        print(f"written to {options.out}")
        return
    model = load_base(options.base)
    load_adapter(model, options.adapter, check_base=not options.no_check_base, as_trained=options.as_trained)
    if options.to == "lora":
        report = save_as_lora(model, options.out, rank=options.rank, tolerance=options.tolerance, progress=_progress)
        print(describe(report))
    else:
        save_adapter(model, options.out, format=options.to)
    print(f"written to {options.out}")


def _merge(options: argparse.Namespace) -> None:
    notes = merge_checkpoint(
        options.base,
        options.adapter,
        options.out,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        check_base=not options.no_check_base,
        as_trained=options.as_trained,
        force=options.force,
        progress=_bytes_progress,
    )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"written to {options.out}")


def load_base(name: str) -> nn.Module:
    """A transformers model in the class that its configuration names, on the CPU, in its own dtype."""
    try:
        import transformers
    except ImportError as error:
        raise AdapterError("--base needs transformers: pip install transformers accelerate") from error
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        model_class = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
        return model_class.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        raise AdapterError(f"the base model {name} cannot be loaded: {error}") from error


def describe(report: dict[str, LayerConversion]) -> str:
    """The errors of a conversion to LoRA, worst first."""
    worst = sorted(report, key=lambda path: -report[path].error)
    lines = [f"{'error of Δ':>10}  {'of W':>8}  {'rank':>5}  exact from"]
    for path in worst[:_MAX_LAYERS]:
        layer = report[path]
        found = "exact" if layer.exact else f"{layer.error:.2%}"
        lines.append(f"{found:>10}  {layer.weight_error:8.3%}  {layer.rank:5}  rank {layer.exact_rank:<5} {path}")
    if len(worst) > _MAX_LAYERS:
        lines.append(f"… and {len(worst) - _MAX_LAYERS} layers with smaller errors")
    mean = sum(layer.error for layer in report.values()) / len(report)
    return "\n".join(
        [*lines, f"{len(report)} layers, mean error of Δ {mean:.2%}, at most {report[worst[0]].error:.2%}"]
    )


def _progress(layers: Iterable[Any]) -> Iterable[Any]:
    try:
        from tqdm import tqdm
    except ImportError:  # it comes with transformers
        return layers
    return tqdm(layers, desc="layers", unit="layer")


def _bytes_progress(size: int) -> Any:
    from tqdm import tqdm  # comes with transformers, without which no model is merged

    return tqdm(total=size, desc="merging", unit="B", unit_scale=True)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
