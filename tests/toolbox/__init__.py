"""What tests share: tiny models, attention in float64, commands, and ways to fail."""
