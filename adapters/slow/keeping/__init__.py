"""How what is learnt is kept: one way per file, composed by name in front of a method (``fisher+interpolate+head``)."""
