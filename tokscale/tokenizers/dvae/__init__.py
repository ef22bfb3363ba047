"""The discrete VAE of DALL-E: Gumbel-softmax codes between convolutions."""
