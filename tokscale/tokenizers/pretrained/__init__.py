"""Published image tokenizers, by local path: nothing here reaches for the network."""
