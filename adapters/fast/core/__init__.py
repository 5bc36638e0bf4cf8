"""What the methods share: base class, registry, normalisation layers, optimisers."""
