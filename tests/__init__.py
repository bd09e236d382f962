"""Tests mirror the tree; `zoo.py` holds the small networks that every invariant runs on."""
