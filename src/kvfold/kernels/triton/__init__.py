"""GPU kernels in Triton. Importing this needs no GPU and no Triton; running it needs both."""
