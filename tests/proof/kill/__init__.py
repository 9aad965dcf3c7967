"""Kill anything: verbs ended at every changing call of their own, by signals, by networks and
disks that fail; then run again and judged.

A verb joins by an entry in cases.VERBS. Everything runs on the small world; real.py does the same
to a real clone.
"""
