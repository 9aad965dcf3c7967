"""The ground floor: errors, paths, settings, terminal, processes, locks and files. Knows nothing of
vLLM.
"""
