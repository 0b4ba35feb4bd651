"""``specdec eval``: plain and speculative decoding side by side, over HTTP, on the same prompts.

The arms are server processes reached through their URLs; nothing here imports training, serving,
torch or vllm.
"""
