"""Attention: one boolean definition per pattern, and many ways to compute it."""
