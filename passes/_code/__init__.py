"""How weights are coded: moments, metric, codebooks, what experts share."""
