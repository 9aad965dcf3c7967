"""A pin moves the whole house, and back: forecast, bump, promote, what was good; and the verbs on
the patch stack.
"""
