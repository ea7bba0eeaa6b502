"""How checkpoints hold quantized weights, a file for each method."""
