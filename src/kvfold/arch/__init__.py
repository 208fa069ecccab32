"""What a model is: one declaration per architecture."""
