"""The Triton kernels of the prefill stage; each file holds one, with its definition in torch."""
