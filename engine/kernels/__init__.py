"""The Triton kernels that both stages use; each file holds one, with its definition in torch."""
