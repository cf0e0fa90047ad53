"""What a graph does to memory: operations over buffers, where they may lie, and in which order and pieces to run them."""
