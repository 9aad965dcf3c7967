"""Moves of the pin: forecast, bump, promotion, known-good states and rollback."""
