"""Where DeepSpeed keeps what: one module per layout, all answering the same questions."""
