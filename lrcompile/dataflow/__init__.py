"""What a model does to memory: stages over buffers, where these may lie, in which order and pieces to compute."""
