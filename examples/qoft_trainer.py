"""QOFT: a 4-bit model finetuned by transformers' Trainer, which stays as it is. Under a minute on a CPU."""

import torch
from _arguments import parse_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import oftv2
from oftv2.callbacks import OFTCallback

source = parse_model(__doc__)
tokenizer = AutoTokenizer.from_pretrained(source)
rows = [tokenizer(f"Is {n} even? Answer: {'no' if n % 2 else 'yes'}") for n in range(64)]
dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # CPUs are slow in bf16
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
model = AutoModelForCausalLM.from_pretrained(source, quantization_config=nf4, dtype=dtype)

oftv2.wrap_model(model, block_size=32)  # the added line
oftv2.print_trainable_parameters(model)

trainer = Trainer(
    model,
    TrainingArguments("qoft-run", max_steps=10, learning_rate=1e-3, logging_steps=2, save_steps=5, report_to="none"),
    train_dataset=rows,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    callbacks=[OFTCallback()],  # logs how far from orthogonal, how large the generators
)
trainer.train()  # trainer.train(resume_from_checkpoint=True) goes on after an interruption

oftv2.merge(model).save_pretrained("qoft-merged")  # a plain model, dequantized; requantize=True keeps 4 bit
