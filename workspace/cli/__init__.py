"""The verbs of `inv`: each parses, calls one function below, prints. They know no git, pip or
cmake.
"""
