"""The limits of the kernels, as their interface states them (see ``cpu/kernel.h``)."""

from kvfold.kernels.cpu.header import CONSTANTS

MAX_DIM = CONSTANTS["KVF_MAX_DIM"]  # numbers of a head
MAX_TOKENS = CONSTANTS["KVF_MAX_TOKENS"]  # queries per sequence that the kernels are meant for
BLOCK = CONSTANTS["KVF_BLOCK"]  # tokens of a packed block
