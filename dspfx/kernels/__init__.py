"""The native group convolution: its structure tensor, its reference, and its kernels."""
