"""Loss and perplexity of a model on held-out text."""
