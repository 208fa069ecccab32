"""``bf16``: as they are."""

from kvfold.ops.format import plain

FORMAT = plain("bf16", code=2, bits=16, stored="bfloat16", step=2)
