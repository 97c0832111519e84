"""`hfedmoe compare`: the same federation under several methods and seeds, as cells that are kept.

A cell is one method and one seed. It runs in a process of its own and becomes one JSON file. Tables and figures are
made of the files alone, so files of several machines can be put together.
"""
