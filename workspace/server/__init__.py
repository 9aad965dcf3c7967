"""Serves a model: recipes, memory fit, weights, one server process."""
