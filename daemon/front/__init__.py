"""The HTTP side: metrics, probes, the page and operator actions, on a port that hostile clients can not take."""
