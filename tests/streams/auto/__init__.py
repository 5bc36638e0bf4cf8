"""More source models, controls, attacks and bundles for the tables of `make bench-auto`.

Apart from `tests.streams`, whose text is part of the names under which its models and results are kept.
"""
