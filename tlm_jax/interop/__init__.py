"""Models from and to other tools: Hugging Face folders and GGUF files."""
