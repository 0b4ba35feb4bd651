"""Runs draft heads: plans a vLLM server for a target and a head, starts it, and leaves nothing behind.

Importing this package loads neither torch nor vLLM; vLLM runs as a process of its own.
"""
