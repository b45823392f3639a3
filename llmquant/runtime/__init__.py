"""Quantized linears computed as a deployed model computes them: in integers."""
