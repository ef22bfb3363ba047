"""Quantizers that are trained with their autoencoder: learned codebooks, residual, lookup-free and finite scalar."""
