"""The status page at ``/``: one self-contained document, and the numbers it shows, as JSON at ``/state``."""
