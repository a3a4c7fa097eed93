"""Supervised finetuning with TRL: an ordinary script, and one added line. Under a minute on a CPU."""

from _arguments import parse_model
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import oftv2

source = parse_model(__doc__)
rows = [{"prompt": f"Is {n} even? Answer:", "completion": " no" if n % 2 else " yes"} for n in range(64)]
model = AutoModelForCausalLM.from_pretrained(source, dtype="float32")

oftv2.wrap_model(model, block_size=32)  # the added line

config = SFTConfig(
    "sft-adapter",
    max_steps=20,
    per_device_train_batch_size=4,
    learning_rate=1e-3,
    logging_steps=5,
    bf16=False,  # slow on CPUs
    report_to="none",
)
trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(rows))
trainer.train()
trainer.save_model()  # the adapter, with a model card; checkpoints hold no more than that either

again = oftv2.load_adapter(AutoModelForCausalLM.from_pretrained(source, dtype="float32"), "sft-adapter")
prompt = trainer.processing_class("Is 101 even? Answer:", return_tensors="pt")
print(trainer.processing_class.decode(again.generate(**prompt, max_new_tokens=1, do_sample=False)[0]))
