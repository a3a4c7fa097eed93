"""One run of the study: attach, train, measure."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from study_examples import Full, LoRA, Prompts, Training, load_base, load_tokenizer, perplexity, train
from study_plan import Method, Row, Run
from study_tasks import OTHER, OTHERS, Task, load_task, score
from torch import nn
from transformers import PreTrainedModel

import oftv2
from oftv2.diagnostics import summary


def attach(method: Method, base: PreTrainedModel) -> nn.Module:
    """Makes the base trainable in the method's way, on every linear layer but the head."""
    if method.kind == "oft":
        return oftv2.wrap_model(base, block_size=method.size, **dict(method.options))
    if method.kind == "full":
        return Full().attach(base)
    if method.kind == "dora":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(
            base,
            LoraConfig(
                r=method.size,
                lora_alpha=2 * method.size,
                use_dora=True,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
        )
    return LoRA(method.size, "all-linear").attach(base)


class Study:
    """The model, the tasks and the machine that runs share."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder, self.device = folder, torch.device(device)
        self.prompts = Prompts(load_tokenizer(folder), "plain")
        self.task: Callable[[str], Task] = cache(lambda name: load_task(name, self.prompts))

    def base(self, kind: str) -> PreTrainedModel:
        """A fresh base model: ``float32``, ``bfloat16``, or ``nf4`` that computes in float32."""
        gc.collect()  # the model before this one
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        return load_base(self.folder, dtype, self.device, "nf4" if kind == "nf4" else "none")

    def measure(self, model: nn.Module, trained_on: str) -> Row:
        """Held-out figures of the task, and what is left of everything else."""
        task = self.task(trained_on)
        with torch.inference_mode():
            prose = perplexity(model, self.prompts)
        others = (self.task(name) for name in OTHERS if name != trained_on)
        return {
            "validation": score(model, task.batches, task.validation),
            "test": score(model, task.batches, task.test),
            "prose_perplexity": prose,
            "others": {other.name: score(model, other.batches, other.test[:OTHER]) for other in others},
        }

    def run_base(self, name: str, kind: str) -> Row:
        """The figures before training."""
        return {"study": "base", "task": name, "method": f"base/{kind}", **self.measure(self.base(kind), name)}

    def run(self, run: Run) -> Row:
        """Trains and measures."""
        task, lr = self.task(run.task), run.lr
        torch.manual_seed(run.seed)
        model = attach(run.method, self.base(run.method.base))
        start = time.process_time()
        record = train(
            model,
            task.batches,
            task.training,
            lr=lr,
            batch_size=task.batch_size,
            steps=run.steps,
            seconds=None,
            seed=run.seed,
            name=run.key,
        )
        if record.interrupted:
            raise KeyboardInterrupt
        cpu_seconds = time.process_time() - start
        row: Row = {
            "key": run.key,
            "study": run.study,
            "task": run.task,
            "method": run.method.name,
            "kind": run.method.kind,
            "size": run.method.size,
            "base": run.method.base,
            "options": dict(run.method.options),
            "lr": lr,
            "seed": run.seed,
            "steps": run.steps,
            "batch_size": task.batch_size,
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            **training_figures(record),
            "cpu_seconds": round(cpu_seconds, 1),
        }
        row["diverged"] = not all(p.isfinite().all() for p in model.parameters() if p.requires_grad)
        if not row["diverged"]:
            row |= self.measure(model, run.task)
            row["diverged"] = not math.isfinite(row["test"]["loss"])
            if run.method.kind == "oft":
                row["rotation"] = summary(model)
        return row


def training_figures(record: Training) -> Row:
    """What the training loop recorded, in short."""
    tail = record.losses[-max(1, len(record.losses) // 8) :]
    return {
        "tokens": sum(record.tokens),
        "final_loss": sum(tail) / len(tail),
        "highest_loss": max(record.losses),
        "losses": [round(loss, 4) for loss in record.losses],
        "seconds": round(record.seconds, 1),
    }
