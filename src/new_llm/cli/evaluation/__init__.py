"""`new-llm eval`: measure a trained model."""
