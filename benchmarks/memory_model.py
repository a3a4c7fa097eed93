"""How much memory a training step takes, predicted from shapes: weights, adapter, gradients, AdamW and activations.

Nothing here is measured; `benchmarks/memory_table.py` prints what it comes to. Bytes kept for the backward pass are
counted tensor by tensor, as transformers' Llama and Qwen2, PEFT and this library keep them, and
`tests/test_memory_model.py` holds them against what they do keep. The peak adds the largest temporary tensors; what an
allocator wastes, a CUDA context and libraries' workspaces are left out.
With T tokens, h the hidden size, f the feed-forward size, s bytes an activation, a bytes an adapter's parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

from model_sizes import Size

GIB = 2**30
# By base, bytes an activation.
ITEMSIZE = {"float32": 4, "bfloat16": 2, "nf4": 2, "nf4-float32": 4}
# Packed nibbles, a scale of 8 bits for 64 of them, and one of 32 bits for 256 scales (double quantization).
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)

# By method, what `benchmarks/methods.py` calls it on an NF4 base; None where it is not meant for one.
METHODS = {
    "frozen": "frozen-nf4",
    "oft": "qoft",
    "lora": "qlora",  # PEFT's default: factors in float32, so that it casts what it reads to float32
    "lora-16bit": "qlora-16bit",  # factors in the base's dtype (autocast_adapter_dtype=False): the leanest LoRA
    "dora": None,
    "peft-oft": "peft-qoft",
    "oftv1": None,
    "oft-peft-0.15": None,  # what the paper compares with: PEFT's OFT before it became OFTv2
    "full": None,
}


@dataclass(frozen=True)
class Step:
    """One training step.

    Attributes:
        method: of METHODS.
        base: ``"float32"``, ``"bfloat16"``, ``"nf4"`` (projections of 4 bit, the rest and activations of 16), or
            ``"nf4-float32"`` (the rest of 32).
        checkpointing: each decoder layer keeps its input alone, and runs again in the backward pass.
        device: on ``"cuda"`` the kernels make rotations on the way, and layers choose their form by its cost.
    """

    size: Size
    method: str
    base: str = "bfloat16"
    batch: int = 4
    sequence: int = 2048
    checkpointing: bool = False
    device: str = "cuda"
    block_size: int = 32
    rank: int = 16

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.base]

    @property
    def adapter_itemsize(self) -> int:
        return self.itemsize if self.method in ("full", "lora-16bit") else 4

    @property
    def input_gradient(self) -> bool:
        """Whether the embedding's output has a gradient."""
        return self.method in ("frozen", "full")


def weights(step: Step) -> int:
    """Bytes of the base model."""
    size = step.size
    if step.base.startswith("nf4"):
        return round(size.linear * NF4_BYTES) + size.others * step.itemsize
    return size.parameters * step.itemsize


def trainable(step: Step) -> int:
    """Parameters that train."""
    size, outputs = step.size, step.size.layers * sum(n for _, n in step.size.projections.values())
    return {
        "frozen": 0,
        "full": size.parameters,
        "lora": size.lora_parameters(step.rank),
        "lora-16bit": size.lora_parameters(step.rank),
        "dora": size.lora_parameters(step.rank) + outputs,
        # Whole blocks, of which the skew part is taken, and a scale for each output.
        "oft-peft-0.15": size.layers * sum(d * step.block_size for d, _ in size.projections.values()) + outputs,
    }.get(step.method, size.oft_parameters(step.block_size))


def layer_kept(step: Step) -> int:
    """Bytes that one decoder layer keeps for its backward pass, its weights apart."""
    size, T, s = step.size, step.tokens, step.itemsize
    norms = 2 * T * (4 * size.hidden + 4)  # the input in float32, and its inverse root mean square
    attention = T * (2 * size.hidden + 2 * size.kv) * s + 4 * T * size.heads  # q, k, v, output, logarithms of sums
    feed_forward = 3 * T * size.ffn * s  # gate's output, silu of it, up's output
    return norms + attention + feed_forward + _adapters_kept(step)


def _adapters_kept(step: Step) -> int:
    size, T, s, a, method = step.size, step.tokens, step.itemsize, step.adapter_itemsize, step.method
    shapes = size.projections.values()
    inputs, outputs = sum(d for d, _ in shapes), sum(n for _, n in shapes)
    blocks = inputs * step.block_size * 4  # a number for each block's entry of each layer, in float32
    # q, k and v share one input, so do gate and up, and that of o is the attention's output, kept already.
    shared = T * (2 * size.hidden + size.ffn) * s
    own = shared if a == s else T * inputs * a  # a copy for each layer where the adapter is of another dtype
    low_rank = len(shapes) * T * step.rank * a
    if method == "frozen":
        return 0
    if method == "full":
        return shared + 2 * T * size.hidden * s  # the norms' weights train too
    if method == "oft":
        return shared + _delta_kept(step)
    if method in ("lora", "lora-16bit"):
        return own + low_rank
    if method == "dora":  # the outputs of the base layer and of the two factors, and three vectors that scale them
        return own + low_rank + T * outputs * (s + a) + 3 * outputs * a
    if method == "peft-oft":
        return own + 4 * blocks  # Q, Q², Q³ and R
    rotated = sum(n * d for d, n in shapes) * s
    if method == "oftv1":
        # I + Q and the inverse of I − Q, and where in a block each generator goes.
        return shared + rotated + 2 * blocks + len(shapes) * 8 * step.block_size * (step.block_size - 1)
    # The dense identity that the dense rotation is multiplied with, the rotated weight, and the scaled one.
    return shared + sum(d * d for d, _ in shapes) * s + 2 * rotated + 3 * blocks


def _delta_kept(step: Step) -> int:
    """Rotations that are kept: on a CPU; a GPU makes them anew from the generators."""
    return sum(d * step.block_size * 4 for d, _ in step.size.projections.values()) if step.device == "cpu" else 0


def _in_weight_form(step: Step) -> list[tuple[int, int]]:
    """The projections that rotate their weight rather than their input, by the library's own cost model."""
    from oftv2.cost_model import CPU, GPUS, INPUT, WEIGHT, Problem, cheapest

    if step.device == "cpu" and step.base.startswith("nf4"):
        return []  # there it is a kernel's
    on = CPU if step.device == "cpu" else next(gpu for gpu in GPUS if gpu.name == "H100")
    found = []
    for d, n in step.size.projections.values():
        problem = Problem(step.tokens, d, n, step.block_size, step.itemsize, True, step.base.startswith("nf4"))
        if cheapest(problem, (INPUT, WEIGHT), on) == WEIGHT:
            found.append((d, n))
    return found


def head_kept(step: Step) -> int:
    """Bytes that the loss keeps: logarithms of probabilities in float32, and labels."""
    return step.tokens * (4 * step.size.vocabulary + 8)


def kept(step: Step) -> int:
    """Bytes kept for the backward pass by the whole model, weights apart."""
    size, T, s = step.size, step.tokens, step.itemsize
    once = 2 * step.sequence * size.hidden // size.heads * s  # cosines and sines of the positions
    once += T * (4 * size.hidden + 4) + head_kept(step)
    if step.method == "full":
        once += 2 * T * size.hidden * s
    if step.method == "frozen" and s < 4 and not step.checkpointing:
        once += T * size.hidden * s  # the embedding's output, which has a gradient
    if step.checkpointing:
        return once + size.layers * T * size.hidden * s + 8 * step.sequence  # and the positions
    if not step.input_gradient:
        once -= T * (4 * size.hidden + 4)  # nothing asks for the first norm's gradient
        first = size.hidden + 2 * size.kv  # nor for that of its q, k and v
        once -= {
            "peft-oft": 3 * size.hidden * step.block_size * 4,
            "dora": first * step.adapter_itemsize,
            "oftv1": first * size.hidden * s,
            "oft-peft-0.15": first * size.hidden * s,
        }.get(step.method, 0)
    return once + size.layers * layer_kept(step)


def layer_transient(step: Step) -> int:
    """The largest temporary tensors of one layer's backward pass, beside what is kept: those of ``down_proj``."""
    size, T, s, a = step.size, step.tokens, step.itemsize, step.adapter_itemsize
    wide = T * size.ffn
    # Gradients of its input, and of both factors of that, by when an adapter's input is freed.
    one, two = wide * s, (3 if step.method == "frozen" else 2) * wide * s
    if a != s:  # copies in the adapter's dtype
        two += {"lora": 1, "peft-oft": 2, "dora": 2}.get(step.method, 0) * wide * a
    largest, square = size.hidden * size.ffn, size.ffn**2
    weight = 0
    if step.base.startswith("nf4"):
        weight = largest * s  # dequantized
    elif step.method == "oft":
        weight = max((n * d for d, n in _in_weight_form(step)), default=0) * s  # rotated
    elif step.method in ("oftv1", "oft-peft-0.15"):  # gradients of the rotated weight and of the dense rotation
        weight = largest * s + square * (s if s == 4 else s + 4)
    elif step.method == "dora":  # the weight, its update and their sum; an identity to multiply
        weight = 3 * largest * a + square * a
    return T * size.hidden * s + max(two, one + weight)


def peak(step: Step) -> int:
    """Bytes at the fullest moment of a step, once AdamW has its states."""
    size, T = step.size, step.tokens
    adapter = trainable(step) * step.adapter_itemsize
    standing = weights(step) + 2 * adapter + (0 if step.method == "full" else adapter)
    loss = kept(step) + 8 * T * size.vocabulary  # gradients of the loss and of the softmax, in float32
    after = kept(step) - head_kept(step)
    norm = after + 5 * 4 * T * size.hidden  # temporary tensors of its backward pass, in float32
    layer = after - T * (4 * size.hidden + 4) + layer_transient(step)
    if step.checkpointing:  # in float32, what the layer keeps of its input is what was kept already
        layer += layer_kept(step) - (4 * T * size.hidden if step.itemsize == 4 else 0)
    update = 2 * adapter  # gradients, and a denominator of their size
    return standing + max(loss, norm, layer, update)
