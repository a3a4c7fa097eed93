"""The tables of ``report.py``: one from each kind of result."""

from __future__ import annotations

from typing import Any

from tabular import markdown

from plots import Row, load

NAMES = {
    **{"frozen": "frozen base", "oft": "**OFT, b = 32**", "peft-oft": "PEFT's OFT, b = 32", "lora": "LoRA, r = 16"},
    **{"dora": "DoRA, r = 16", "oftv1": "original OFT, b = 32", "full": "all weights"},
    **{"frozen-nf4": "frozen NF4 base", "qoft": "**QOFT, b = 32**", "peft-qoft": "PEFT's QOFT, b = 32"},
    **{"qlora": "QLoRA, r = 16", "peft-oft-accelerated": "PEFT's OFT, `accelerate_peft`"},
}
SHAPES = [(1024, 1024, 1024), (4096, 576, 576), (2048, 1536, 576), (2048, 576, 1536), (512, 2048, 2048)]
SHAPES.append((1, 1024, 1024))
NOTHING = "—"


def finetune_table(report: dict[str, Any]) -> str:
    """What the main job gave, a column a method."""
    methods, before = report["methods"], report["before"]
    trained, after = ([m[key] for m in methods.values()] for key in ("training", "after"))
    rows = [
        ["", "base", *(name.upper() if name == "oft" else "LoRA (PEFT)" for name in methods)],
        ["settings", "", *(settings(name, report) for name in methods)],
        ["trainable parameters", "0", *(f"{m['trainable_parameters'] / 1e6:.2f} M" for m in methods.values())],
        ["held-out sums exactly right", f"{before['exact']:.1%}", *(f"{a['exact']:.1%}" for a in after)],
        [
            "perplexity of unrelated prose (lower: less forgotten)",
            *(f"{a['perplexity']:.1f}" for a in (before, *after)),
        ],
        ["tokens per second", "", *(f"{t['tokens_per_second']:.0f}" for t in trained)],
        ["training time", "", *(f"{t['seconds']:.0f} s" for t in trained)],
        ["peak memory", "", *(f"{t['peak_memory_bytes'] / 2**30:.2f} GiB" for t in trained)],
    ]
    return markdown(rows)


def settings(name: str, report: dict[str, Any]) -> str:
    """The size and learning rate of a method."""
    size = f"b = {report['arguments']['block_size']}" if name == "oft" else f"r = {report['arguments']['rank']}"
    return f"{size}, lr {report['methods'][name]['lr']:g}"


def layer_table(rows: list[Row]) -> str:
    """One layer's time over the frozen layer's, a column a method."""
    found = {(r["tokens"], r["in"], r["out"], r["method"]): r for r in rows if r["block_size"] == 32}
    methods = ("oft", "lora", "peft-oft", "peft-oft-accelerated", "dora", "oftv1", "full")
    lines = [["tokens, in → out", "frozen layer", *(NAMES[method] for method in methods)]]
    for shape in SHAPES:
        frozen = found.get((*shape, "frozen"))
        if frozen is None:
            continue
        mode = "" if frozen["mode"] == "forward + backward" else f" ({frozen['mode']})"
        cells = [found.get((*shape, method), {}) for method in methods]
        name = "{}, {} → {}".format(*shape) + mode
        lines.append([name, f"{frozen['ms']:.3g} ms", *(number(cell, "over_frozen", ".2f") for cell in cells)])
    return markdown(lines)


def model_table(place: str, methods: tuple[str, ...]) -> str:
    """Everything about a whole model, a row a method."""
    steps = load(f"step-{place}")
    batches = sorted({(row["tokens"], f"{row['batch']} × {row['length']}") for row in steps if "tokens" in row})
    head = ["", "trains", *(f"tokens/s at {name}" for _, name in batches), "memory of training", "kept for backward"]
    lines = [[*head, "generates", "merges", "wraps"]]
    for method in methods:
        mine = {suite: only(load(f"{suite}-{place}"), method) for suite in ("memory", "decode", "merge", "wrap")}
        step = {row["tokens"]: row for row in steps if row.get("method") == method}
        memory = first(mine["memory"], checkpointing=False)
        decode = first(mine["decode"], merged=False, sequences=1)
        any_row = next(iter(step.values()), {})
        speeds = [number(step.get(tokens, {}), "tokens_per_second", ".0f") for tokens, _ in batches]
        lines.append(
            [
                *(NAMES[method], number(any_row, "trainable", ".2f", 1e-6, " M"), *speeds),
                *(number(memory, key, ".2f", 2**-30, " GiB") for key in ("peak_bytes", "saved_bytes")),
                *(number(decode, "ms", ".0f", unit=" ms/token"), number(first(mine["merge"]), "ms", ".2f", 1e-3, " s")),
                number(first(mine["wrap"]), "ms", ".2f", 1e-3, " s"),
            ]
        )
    return markdown(lines)


def experts_table(rows: list[Row]) -> str:
    """The experts of a mixture beside LoRA on them."""
    lines = [["", "frozen", "**OFT, b = 32**", "LoRA, r = 16", "OFT over LoRA"]]
    lines[0] += [f"{what}, {name}" for what in ("kept for backward", "trains") for name in ("OFT", "LoRA")]
    for group in dict.fromkeys(row["group"] for row in rows):
        frozen, oft, lora = (first(rows, group=group, method=method) for method in ("frozen", "oft", "lora"))
        lines.append(
            [
                group.replace(" x ", " × "),
                number(frozen, "ms", ".3g", unit=" ms"),
                *(number(row, "over_frozen", ".2f") for row in (oft, lora)),
                number(oft, "over_lora", ".2f"),
                *(number(row, "saved_bytes", ".0f", 2**-20, " MiB") for row in (oft, lora)),
                *(number(row, "trainable", ".2f", 1e-6, " M") for row in (oft, lora)),
            ]
        )
    return markdown(lines)


def only(rows: list[Row], method: str) -> list[Row]:
    return [row for row in rows if row.get("method") == method]


def first(rows: list[Row], **fields: Any) -> Row:
    """The first row with these values, or an empty one."""
    return next((row for row in rows if all(row.get(key) == value for key, value in fields.items())), {})


def number(row: Row, key: str, form: str, scale: float = 1.0, unit: str = "") -> str:
    """A figure, or why there is none."""
    return f"{row[key] * scale:{form}}{unit}" if key in row else row.get("missing", NOTHING)


def where(rows: list[Row]) -> str:
    """On what machine, with which versions, in how many rounds."""
    timed = [row for row in rows if "rounds" in row]
    if not timed:
        return "not measured here"
    row, rounds = timed[-1], sorted({row["rounds"] for row in timed})
    packages = ", ".join(f"{name} {row[name]}" for name in ("torch", "peft", "bitsandbytes") if row[name] != "unknown")
    counted = f"{rounds[0]} to {rounds[-1]}" if len(rounds) > 1 else rounds[0]
    return f"{row['device']}, {row['threads']} threads, {packages}; medians of {counted} rounds"
