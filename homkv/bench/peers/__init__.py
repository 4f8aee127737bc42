"""Rival decode kernels, each as fast as we can make it: 16 bits, 8 bits, and kernels that dequantize."""
