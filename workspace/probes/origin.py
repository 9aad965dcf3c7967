"""Where would this interpreter import vLLM from? Found without importing it. One JSON document on
stdout.
"""

import importlib.util
import json

if __name__ == "__main__":
    found = importlib.util.find_spec("vllm")
    print(json.dumps({"schema": 1, "vllm": found.origin if found else None}))
