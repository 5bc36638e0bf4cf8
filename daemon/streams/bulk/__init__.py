"""Kafka's record batches read and written whole, past kafka-python's record-by-record code.

Both ways hook into names of kafka-python that are not public. Each is tried out at the start against the public path
(``install.usable``, ``write.usable``); where they differ, the public path stays in use.
"""
