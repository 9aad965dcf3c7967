"""The frontend that is not built here."""
