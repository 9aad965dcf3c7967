"""The machine and the interpreter of `.vllm`: their facts, their faults, the installed packages."""
