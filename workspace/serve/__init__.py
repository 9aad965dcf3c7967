"""Models and how to serve them: recipes, whether they fit into memory, what has to be fetched before."""
