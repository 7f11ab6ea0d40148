"""Fine-tune a Llama on a card that is too small for it, and finish.

Without a GPU the card is virtual, of 290 MiB or what --card says. On a GPU, --card limits it.
"""

import argparse
import pydoc_data.topics
import warnings
from contextlib import nullcontext

import rich
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer, LlamaConfig
from trl import SFTConfig, SFTTrainer

import oomguard
from oomguard.memory.size import parse_bytes
from oomguard.testing import VirtualCard

parser = argparse.ArgumentParser(description="Fine-tune on a card that is too small, and finish.")
parser.add_argument("--card", type=parse_bytes, help="memory of the card, for example 2GiB")
parser.add_argument("--model", help="folder or Hub name of a causal language model")
options = parser.parse_args()
gpu = torch.cuda.is_available()
if gpu and options.card:
    torch.cuda.set_per_process_memory_fraction(options.card / torch.cuda.mem_get_info()[1])
disable_progress_bars()
warnings.simplefilter("ignore")

topics = pydoc_data.topics.topics.values()  # the Python language reference
texts = [part for topic in topics for part in topic.split("\n\n") if len(part) > 80]
train, test = Dataset.from_dict({"text": texts}).train_test_split(64, seed=0).values()
args = SFTConfig(
    "outputs/quickstart", max_steps=32, learning_rate=1e-2, max_length=512, seed=3, warmup_steps=4,
    per_device_train_batch_size=8, gradient_accumulation_steps=2, per_device_eval_batch_size=2,
    activation_checkpointing=False, bf16=gpu, use_cpu=not gpu, disable_tqdm=True, save_strategy="no"
)  # fmt: skip
lora = LoraConfig(r=16, target_modules="all-linear")
with nullcontext() if gpu else VirtualCard(options.card or "290MiB"):
    if options.model:
        dtype, args.learning_rate = torch.bfloat16 if gpu else torch.float32, 2e-4
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    else:  # a new model, whose embeddings are trained too
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(
            vocab_size=1024, hidden_size=64, intermediate_size=192, num_hidden_layers=6,
            num_attention_heads=4, bos_token_id=0, eos_token_id=0,
        ))  # fmt: skip
        tokenizer = GPT2Tokenizer().train_new_from_iterator(texts, 1024, show_progress=False)
        lora.modules_to_save = ["embed_tokens", "lm_head"]
    trainer = SFTTrainer(model, args, None, train, test, tokenizer, peft_config=lora)
    before = trainer.evaluate()["eval_loss"]
    report = oomguard.fit(trainer)  # in place of trainer.train()
    after = trainer.evaluate()["eval_loss"]
if not rich.get_console().is_terminal:  # in a terminal, fit() has shown the report
    rich.print(report)
rich.print(f"eval loss {before:.2f} -> {after:.2f}")
