"""Moves of the pin: forecast, bump, promotion, rollback, known-good states."""
