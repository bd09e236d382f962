"""The zoo's networks, sorted by what makes them hard; `tests/zoo.py` lists them."""
