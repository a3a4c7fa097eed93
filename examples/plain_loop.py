"""The whole of finetuning with oftv2 in one plain PyTorch loop: wrap, train, save.

A tiny Llama with random weights learns to count, so that this runs anywhere in seconds. For a real model, replace the
two lines that make it by ``AutoModelForCausalLM.from_pretrained(...)`` and the batches by your own.
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from oftv2 import print_trainable_parameters, save_adapter, wrap_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", nargs="?", default="counting-adapter", help="where the adapter goes (%(default)s)")
arguments = parser.parse_args()

torch.manual_seed(0)
config = LlamaConfig(vocab_size=16, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)

wrap_model(model, block_size=32)  # freezes the model and puts a trainable rotation before every linear layer
print_trainable_parameters(model)

trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trainable, lr=2e-3, weight_decay=0.0)
for step in range(1, 61):
    start = torch.randint(config.vocab_size, (16, 1))
    tokens = (start + torch.arange(24)) % config.vocab_size  # 16 rows, each counting up from somewhere
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step == 1 or step % 10 == 0:
        print(f"step {step:3d}  loss {loss.item():.3f}")

folder = save_adapter(model, arguments.folder)
print(f"adapter saved in {folder}; load_adapter(base_model, {str(folder)!r}) puts it onto the base model again")
