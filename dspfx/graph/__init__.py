"""Reading a model: its graph, its channels, its cost."""
