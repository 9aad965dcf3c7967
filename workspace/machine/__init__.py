"""Adapters to the machine and to the interpreter: what is there, what is missing, and what goes
into `.vllm`.
"""
