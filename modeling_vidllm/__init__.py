"""The model; its `*_vidllm.py` files travel inside checkpoints. Importing this package loads nothing."""
