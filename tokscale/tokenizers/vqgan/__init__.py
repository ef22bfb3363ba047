"""Autoencoders around a trained quantizer: VQGAN, RQ-VAE and ViT-VQGAN are configurations of one codec."""
