"""The README.md beside an adapter or a merged model: what it is, of which base model, and how to load it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .adapter_file import AdapterFile, write_atomically

CARD_FILE = "README.md"
LIBRARY = "oftv2"
TAGS = ("oftv2", "oft", "orthogonal-finetuning")
_MARK = re.compile(r"<!-- oftv2 wrote this card \((\w+)\); once edited, it is kept as it is -->\n")


def write_card(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the card of the adapter that ``manifest`` describes, unless there is one that somebody wrote or edited.

    Args:
        folder (Path): where the adapter is.
        manifest (dict): what is saved as the adapter's description.
    """
    path = folder / CARD_FILE
    if is_edited(path):
        return
    card = _card(manifest)
    mark = f"<!-- oftv2 wrote this card ({_digest(card)}); once edited, it is kept as it is -->\n"
    write_atomically(path, (card + mark).encode())


def write_merged_card(folder: Path, base: Path, name: str, adapter: AdapterFile) -> None:
    """Writes the card of a base model with an adapter merged into it; the base's own card speaks of another model.

    Args:
        folder (Path): where the merged model is.
        base (Path): where the base model is; its license is taken over.
        name (str): the base model's name on the Hub, or its folder.
        adapter (AdapterFile): what was merged.
    """
    on_hub = not os.path.exists(name)
    header = _header("transformers", name if on_hub else "", "finetune", _license(base / CARD_FILE))
    shown = f"[{name}](https://huggingface.co/{name})" if on_hub else f"`{Path(name).resolve().name}`"
    full = f" {len(adapter.trained)} parameters were trained in full." if adapter.trained else ""
    card = f"""{header}

# {shown} with an OFT adapter merged into its weights

Rotations of {len(adapter.block_sizes)} layers, trained by orthogonal finetuning (OFTv2 / QOFT,
[arXiv 2506.19847](https://arxiv.org/abs/2506.19847)), are part of the weights.{full} It is a plain model: it loads with
`from_pretrained`, and needs no other library than the base model does. It was made with `oftv2`.
"""
    write_atomically(folder / CARD_FILE, card.encode())


def _header(library: str, base: str, relation: str, license: Sequence[str] = ()) -> str:
    """A card's metadata; ``base`` is the base model's name on the Hub, or nothing."""
    model = [f"base_model: {base}", f"base_model_relation: {relation}"] if base else []
    lines = [f"library_name: {library}", *model, *license, "tags:", *(f"- {tag}" for tag in TAGS)]
    return "\n".join(["---", *lines, "---"])


def _license(card: Path) -> list[str]:
    """The lines on the license in a card's metadata."""
    if not card.is_file():
        return []
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    return re.findall(r"^license\w*:.+$", parts[1], re.M) if len(parts) == 3 and not parts[0] else []


def is_edited(path: Path) -> bool:
    """Whether there is a card that is not as this library wrote it."""
    if not path.exists():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    mark = _MARK.search(text)
    return mark is None or mark[1] != _digest(_MARK.sub("", text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _card(manifest: dict[str, Any]) -> str:
    base, config = manifest["base"], manifest["config"]
    name = base["name_or_path"]
    on_hub = bool(name) and not os.path.exists(name)
    header = _header(LIBRARY, name if on_hub else "", "adapter")
    shown = f"[{name}](https://huggingface.co/{name})" if on_hub else f"a `{base['class']}`"
    source = name if on_hub else "path/to/the/base/model"
    causal = base["class"].endswith(("ForCausalLM", "LMHeadModel"))
    cls = "AutoModelForCausalLM" if causal else base["class"]
    imported = f"\nfrom transformers import {cls}" if causal or (name and "For" in cls) else ""
    loaded = f'{cls}.from_pretrained("{source}")  # or quantized' if causal or name else "…  # the base model"
    sizes = sorted(set(manifest["block_sizes"].values()))
    rows = {
        "adapted layers": len(manifest["block_sizes"]),
        "block sizes": ", ".join(map(str, sizes)),
        "parameters trained in full": len(manifest["trained_parameters"]),
        **{f"`{field}`": f"`{value!r}`".replace("|", "\\|") for field, value in config.items()},
    }
    table = "\n".join(f"| {field} | {value} |" for field, value in rows.items())
    peft = (
        "PEFT (0.18 and up) reads it too: `PeftModel.from_pretrained(model, …)`.\n\n"
        if manifest["layout"] == "peft"
        else ""
    )
    return f"""{header}

# OFT adapter

An orthogonal finetuning adapter (OFTv2 / QOFT, [arXiv 2506.19847](https://arxiv.org/abs/2506.19847)) for {shown}: a
trainable rotation in front of frozen linear layers. It was made with `oftv2`.

## How to load it

```python
import oftv2
from huggingface_hub import snapshot_download{imported}

model = {loaded}
oftv2.load_adapter(model, snapshot_download("user/name-of-this-repository"))  # or a local folder
oftv2.merge(model)  # optional: a plain model again, without any overhead
```

{peft}## Configuration

| | |
|---|---|
{table}

"""
