"""``fp32``: as they are."""

from kvfold.ops.format import plain

FORMAT = plain("fp32", code=0, bits=32, stored="float32")
