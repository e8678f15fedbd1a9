"""Videos, chats and given geometry in, model inputs out; its `*_vidllm.py` files travel inside checkpoints. Importing this package loads nothing."""
