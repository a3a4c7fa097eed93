"""The shapes of the language models that benchmarks run on, with their parameter counts: SmolLM2, Qwen2.5, Llama."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Size:
    """A decoder with grouped-query attention, SwiGLU and RMS norms.

    Attributes:
        hidden, ffn (int): widths of the residual stream and of the feed-forward layer.
        layers, heads, kv_heads (int): decoder layers, query heads, heads of k and v.
        vocabulary (int): rows of the embedding and of the output head.
        tied (bool): the head is the embedding.
        qkv_bias (bool): q, k and v have biases (Qwen2.5).
    """

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False
    qkv_bias: bool = False

    @property
    def kv(self) -> int:
        """Width of k and of v."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """The seven linear layers of a decoder layer: inputs and outputs."""
        d, kv, ffn = self.hidden, self.kv, self.ffn
        shapes = [(d, d), (d, kv), (d, kv), (d, d), (d, ffn), (d, ffn), (ffn, d)]
        return dict(zip(PROJECTIONS, shapes, strict=True))

    @property
    def linear(self) -> int:
        """Weights of all projections of all layers: what 4-bit quantization packs."""
        return self.layers * sum(d * n for d, n in self.projections.values())

    @property
    def others(self) -> int:
        """All other parameters: embedding, head, norms and biases."""
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.hidden
        biases = (self.hidden + 2 * self.kv) * self.qkv_bias
        return embeddings + self.layers * (2 * self.hidden + biases) + self.hidden

    @property
    def parameters(self) -> int:
        """All parameters, a tied head counted once."""
        return self.linear + self.others

    def oft_parameters(self, block_size: int = 32) -> int:
        """Generators of OFT on all projections, ``d (b − 1) / 2`` each."""
        return self.layers * sum(d * (block_size - 1) // 2 for d, _ in self.projections.values())

    def lora_parameters(self, rank: int = 16) -> int:
        """LoRA's two factors on all projections."""
        return self.layers * rank * sum(d + n for d, n in self.projections.values())

    def one_layer(self, vocabulary: int = 256) -> Size:
        """The same shapes cut to one decoder layer, with a small vocabulary."""
        return Size(self.hidden, self.ffn, 1, self.heads, self.kv_heads, vocabulary, self.tied, self.qkv_bias)

    def config(self, **fields: Any) -> Any:
        """The configuration of transformers."""
        from transformers import LlamaConfig, Qwen2Config

        return (Qwen2Config if self.qkv_bias else LlamaConfig)(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            tie_word_embeddings=self.tied,
            **{"use_cache": False, **fields},
        )


def _qwen(*shape: int, tied: bool = False) -> Size:
    return Size(*shape, tied=tied, qkv_bias=True)


# From the models' config.json on huggingface.co.
SIZES = {
    "SmolLM2-135M": Size(576, 1536, 30, 9, 3, 49152, tied=True),
    "Qwen2.5-0.5B": _qwen(896, 4864, 24, 14, 2, 151936, tied=True),
    "Qwen2.5-1.5B": _qwen(1536, 8960, 28, 12, 2, 151936, tied=True),
    "Qwen2.5-3B": _qwen(2048, 11008, 36, 16, 2, 151936, tied=True),
    "Llama-2-7B": Size(4096, 11008, 32, 32, 32, 32000),
    "Qwen2.5-7B": _qwen(3584, 18944, 28, 28, 4, 152064),
    "Llama-3-8B": Size(4096, 14336, 32, 32, 8, 128256),
    "Llama-2-13B": Size(5120, 13824, 40, 40, 40, 32000),
    "Qwen2.5-14B": _qwen(5120, 13824, 48, 40, 8, 152064),
    "Qwen2.5-32B": _qwen(5120, 27648, 64, 40, 8, 152064),
    "Qwen2.5-72B": _qwen(8192, 29568, 80, 64, 8, 152064),
}
USUAL = ("Llama-3-8B", "Qwen2.5-7B")  # where two have to do
# For running the code, not for figures.
TINY = Size(64, 128, 2, 4, 2, 128)
TINY_QWEN = Size(96, 160, 2, 6, 2, 128, tied=True, qkv_bias=True)
