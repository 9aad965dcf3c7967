"""How fast the built tree is: records of vLLM's own benchmarks, a verdict on two of them, and a
page that shows them all.
"""
