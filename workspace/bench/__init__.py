"""How fast the built tree is: records, comparisons, A/B, bisect, report."""
