"""What a format does to a model: divergence from the exact model, and retrieval."""
