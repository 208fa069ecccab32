"""StarCoder2."""

from kvfold.arch.family import Family

FAMILIES = (Family(("starcoder2",), "biases", mlp_output="mlp.c_proj", mlp_matrices=2),)
