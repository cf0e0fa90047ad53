"""What a graph does to memory: buffers, where they may lie, and in which order and pieces to fill them."""
