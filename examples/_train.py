"""The training loop: AdamW, a warm-up and a decay, a progress bar, and Ctrl-C that stops cleanly."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType

import psutil
import torch
from _data import IGNORE, Example, Prompts
from torch import nn
from tqdm import tqdm

WARMUP = 0.05  # share of the training in which the learning rate rises


@dataclass
class Training:
    """What a training run recorded, step by step."""

    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # seconds since the start, at the end of each step
    peak_memory: int = 0  # bytes
    interrupted: bool = False

    @property
    def seconds(self) -> float:
        return self.times[-1] if self.times else 0.0

    @property
    def tokens_per_second(self) -> float:
        return sum(self.tokens) / self.seconds if self.seconds else 0.0


class PeakMemory:
    """The most memory in use inside the ``with`` block, in bytes: of the GPU, or of the whole process on a CPU."""

    def __init__(self, device: torch.device, every: float = 0.02) -> None:
        self.device, self.every, self.bytes = device, every, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._done.wait(self.every):
            self.bytes = max(self.bytes, process.memory_info().rss)

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.bytes = psutil.Process().memory_info().rss
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self._done.set()
            self._thread.join()


def batches(examples: list[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Endless shuffled passes over the examples."""
    order, shuffler = list(examples), random.Random(seed)
    waiting: list[Example] = []
    while True:
        shuffler.shuffle(order)
        waiting += order
        while len(waiting) >= size:
            yield waiting[:size]
            del waiting[:size]


def schedule(progress: float) -> float:
    """Factor of the learning rate at ``progress`` in [0, 1]: a linear rise, then half a cosine down to nothing."""
    if progress < WARMUP:
        return max(progress, 1e-3) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP))))


def answer_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy of the answers; the logits of the prompts, a large part of a small model's work, are not made."""
    labels = batch["labels"]
    first = int((labels != IGNORE).any(dim=0).nonzero()[0])  # the first column that any row has to predict
    kept = labels.shape[1] - first + 1
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=kept, use_cache=False
    ).logits
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, first:].flatten(), ignore_index=IGNORE
    )


def train(
    model: nn.Module,
    prompts: Prompts,
    examples: list[Example],
    *,
    lr: float,
    batch_size: int,
    steps: int | None,
    seconds: float | None,
    seed: int,
    name: str,
) -> Training:
    """Trains the parameters that require a gradient, for ``steps`` steps or ``seconds`` seconds, whichever ends first.

    Ctrl-C ends the training early and is recorded, not raised, so that the caller can save what there is.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    record = Training()
    source = batches(examples, batch_size, seed)
    model.train()
    with PeakMemory(device) as memory, tqdm(total=steps, desc=f"training {name}", unit="step") as bar:
        start = time.perf_counter()
        try:
            while True:
                elapsed = time.perf_counter() - start
                progress = max(len(record.losses) / steps if steps else 0.0, elapsed / seconds if seconds else 0.0)
                if progress >= 1:
                    break
                for group in optimizer.param_groups:
                    group["lr"] = lr * schedule(progress)
                batch = {key: value.to(device) for key, value in prompts.training_batch(next(source)).items()}
                loss = answer_loss(model, batch)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                record.losses.append(loss.item())
                record.tokens.append(int(batch["attention_mask"].sum()))
                record.times.append(time.perf_counter() - start)
                bar.update()
                bar.set_postfix_str(f"loss {record.losses[-1]:.3f}, {record.tokens_per_second:.0f} tokens/s")
        except KeyboardInterrupt:
            record.interrupted = True
    record.peak_memory = memory.bytes
    model.eval()
    return record
