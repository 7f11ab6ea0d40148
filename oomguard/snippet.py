def snippet(plan):
    return '''from peft import LoraConfig
from trl import SFTConfig

args = SFTConfig(
    output_dir="outputs",
    per_device_train_batch_size=4,
    gradient_accumulation_steps=8,
    max_length=1024,
    activation_checkpointing=True,
    optim="adamw_torch_fused",
)
peft_config = LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])'''
