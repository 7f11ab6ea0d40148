"""How much memory a fine-tune will take, before it runs."""
