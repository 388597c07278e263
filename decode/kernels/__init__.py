"""The Triton kernels of the decode stage, and what its steps plan for them on the device."""
