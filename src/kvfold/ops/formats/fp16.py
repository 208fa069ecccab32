"""``fp16``: as they are."""

from kvfold.ops.format import plain

FORMAT = plain("fp16", code=1, bits=16, stored="float16")
