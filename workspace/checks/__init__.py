"""Does the built tree compute rightly: checks with a verdict, their record, and the door `python -m
workspace.smoke`.
"""
